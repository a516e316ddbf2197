"""The offline job: photographs in, annotated shards out (read → caption → segment → matte → filter → write → report).

``job.run(**settings)`` does all of it and takes plain arguments; the keys below are those arguments, in the nesting
that ``configs/prepare.yaml`` uses. Nested blocks are passed as mappings.

==============================  ===============  ======================================================================
key                             default          meaning, unit
==============================  ===============  ======================================================================
input                           required         folder, .tar (or a folder of tars), .csv, .parquet, .json or .jsonl
output                          required         folder for shards, index, rejected.jsonl, report.html
kind                            subjects         ``subjects``: shards with mattes; ``backgrounds``: photographs only
overwrite                       false            remove a job in ``output`` made with other settings or inputs
categories                      null             null: name of the sub-folder, or the table's column; a .csv/.json file
                                                 of path or folder → category; other text: one for all
captions                        null             null: sidecar .txt or column, else ``a photo of a ⟨category⟩``;
                                                 a .csv/.json file of path → caption
openimages                      null             {boxes: csv, classes: csv, area: [0.1, 0.8], exclude: [names]}
limit                           null             first so many photographs only
seed                            0                for pictures in the report; nothing in the shards is random
photographs_per_shard           64               unit of work and of resuming; rejected ones leave a shard smaller
workers                         null             processes; null: the CPU cores at hand
device                          cpu              of the CLIPSeg segmenter
image.longest_side_px           512              larger photographs are resized to it; smaller ones are kept
image.shortest_side_px          64               smaller photographs are rejected
image.max_pixels                100000000        width × height read from the header before decoding
image.format                    jpg              of the stored photograph: jpg or png
image.jpeg_quality              95               1..100
segmenter.name                  grabcut          grabcut, clipseg or alpha (own alpha channel, NAME.alpha.png)
segmenter.model                 null             clipseg: local folder or hub id
segmenter.batch_size            8                clipseg: photographs a forward
trimap.foreground_threshold     0.7              seg_prob at or above is foreground
trimap.background_threshold     0.1              seg_prob at or below is background
trimap.margin                   0.01             unknown border added on both sides, share of the longest side
matting.engine                  fast             fast or pymatting (the reference)
matting.foreground_colours      true             store .fg.jpg, estimated colours without background bleeding
filters.area                    [0.02, 0.9]      share of the frame under the matte, smallest and largest
filters.border_contact          0.5              largest share of the frame's border pixels the subject may touch
filters.unknown_share           0.5              largest unknown share of the trimap
filters.blur                    10.0             smallest variance of the Laplacian of the grey photograph (0..255)
filters.num_components          5                most separate parts of the matte, each ≥ 1 % of it
filters.duplicate_distance      4                most bits of 64 in which duplicates' hashes differ; null: keep all
report.enabled                  true             write report.html
report.num_thumbnails           48               mattes and composites shown; rejections: 8 of each cause
==============================  ===============  ======================================================================
"""
