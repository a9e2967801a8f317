"""Images in shards: a few hundred files of some hundred megabytes, on this machine or in an object store.

store       where the shards lie: a folder, or what fsspec knows by its URL
index       which image lies where in a shard: made once, and kept beside it
tar         WebDataset's form: tars of <key>.jpg and <key>.cls
parquet     the hubs' form: Parquet with a column of images and one of labels
images      the images of a split: any one at any time, whichever form they have
"""

from data.shards.images import describe, open_split

__all__ = ["describe", "open_split"]
