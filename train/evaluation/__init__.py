"""What a network is worth: by task, over all processes, every image counted once."""
