"""Captions for the regions of whole collections: `perceptiondlm annotate`, on one machine or on a Ray cluster.

    job        what is asked, as one object that travels to every worker
    sources    what a source holds, cut into parts: folders, COCO files, tables, shards, data sets on the Hub
    plan       the parts in a file, written once, and what is finished; the one mechanism of resuming
    reading    the images of a part, their regions found and measured
    captioner  a part's regions through the model, in batches of regions
    engines    the same two steps in threads, or as Ray Data's tasks and actors
    results    parts merged into parquet; exports, preview, publishing

A part is a run of images. Its regions are written as one parquet file under a name that follows from the plan, at once
or not at all: what was killed is done again, and nothing is done twice.
"""
