"""RepOptimizers in other frameworks; a module each, which imports that framework. They are the extra integrations."""
