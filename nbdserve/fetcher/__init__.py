"""The fetcher process: what lazy volumes lack comes through it (snapshots/fetcher.py).

The daemon (``process``) speaks to it (``service``) over a channel, as it does to workers: so the
S3 client, and all hashing and decompressing, stay out of the processes that serve volumes. It has
the daemon's environment, hence its credentials.
"""
