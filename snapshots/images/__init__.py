"""Disk images: files that other programs understand, written from snapshots and read into them."""
