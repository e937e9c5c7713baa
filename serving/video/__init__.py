"""Regions of a video: masklets in, captions with their time spans out.

A video is cut into shots, each shot gets key frames, each key frame is encoded once, and the regions seen in it are
captioned from that one picture. Nothing is claimed about time: a caption says what a region looks like in its key
frame, and its span says how long that was the last look at it. There is no tracker here: masks come from one.

>>> captions = caption_video(pipe, "clip.mp4", read_masklets("clip.json"), preset="fast")
>>> captions[0]
{"object": "1", "start": 0.0, "end": 2.0, "caption": "a red car", "score": 0.93, "frame": 0, "shot": 0, ...}
"""

from perceptiondlm.serving.video.captions import caption_video
from perceptiondlm.serving.video.masklets import Masklet, masklets_of, read_masklets


__all__ = ["Masklet", "caption_video", "masklets_of", "read_masklets"]
