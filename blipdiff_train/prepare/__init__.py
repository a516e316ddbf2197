"""The offline job: photographs in, annotated shards out (read → segment → matte → filter → caption → write → report).

``job.run(**settings)`` does all of it and takes plain arguments, blocks as mappings. ``python -m blipdiff_train prepare
--help`` lists the keys with their meaning, ``configs/commands/prepare.yaml`` has the reasons of the thresholds.
"""
