"""Files and their places: disk, bucket and cache."""
