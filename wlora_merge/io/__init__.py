"""Bytes, folders and the hub.

This room knows files, their digests, folders that appear all at once, and tensors as numbers. It must not know what a model,
an adapter or a mixture is.

safetensors_file   a safetensors file as bytes: Entry, read_header, read_tensor, write_tensors
tensors            questions about tensors, and Workspace, the memory that blocks pass through
direct_write       a new file, written past the page cache
cache              the user's cache folder, and sealed files in it: cache_folder, read_sealed
digests            sha256, computed once and remembered: sha256_files, path_of
staging            all-or-nothing output folders: staged, refuse_out
locks              of two runs to one folder, one wins
signals            signals that end a run
records            a table from elsewhere -> a typed record, checked once: Record, read_record
untrusted          files from elsewhere, opened so that nothing hostile comes of it: find_file, read_json
hub                a path or hub id -> a local folder: Source, resolve_source
"""
