"""What users have, made into the library's shards: ``python -m data_pipelines.ingest SOURCE... --to FOLDER``.

``inputs`` find rows in files, ``styles`` read a row as a record, ``run`` writes what can be used and reports the rest.
Rows are read in processes that may die of them (:mod:`data_pipelines.workers`).
"""
