"""What a run leaves on disk.

files            atomic writes, JSON with a checksum, SHA-256 of files, the lock of a directory
directory        config.json, tokenizer, the rules for continuing a run, opening a saved run
checkpoint       orbax with verification: saving, and restoring a whole state or its weights
manifest         sizes and checksums of the files of a checkpoint
array_checksums  checksums of arrays, computed on their devices
"""
