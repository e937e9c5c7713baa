"""Sources of the drawn world: regions of scenes to caption, and questions about whole scenes to answer."""

import random
from typing import Any

from perceptiondlm.drawn.scenes import Scene, draw_scene, scene_conversation
from perceptiondlm.training.data.data_config import SourceConfig
from perceptiondlm.training.data.sources import AnswerFormat, Measured, Source


class SceneSource(Source):
    """Scenes, each captioned region by region, or, for a share of them, asked one question about the whole image.

    Record i is `draw_scene(seed, i)`; which question is asked depends on the epoch.
    """

    def __init__(self, config: SourceConfig, answers: AnswerFormat):
        self.seed, self.num_scenes, self.answers = config.seed, config.samples or 0, answers
        self.share = 1.0 if config.kind == "scene_conversations" else config.conversation_share
        self.key = str(config.seed)

    def __len__(self) -> int:
        return self.num_scenes

    def place(self, record: int) -> str:
        return f"scene {self.seed}/{record}"

    def measure(self, record: int) -> Measured:
        """Tokens of image, regions and answers; the text of the prompt, much the same everywhere, is left out."""
        scene = draw_scene(self.seed, record)
        regions = 0 if self._is_conversation(record) else len(scene.objects)
        tokens = self.answers.processor.prompt_length(scene.image.size, regions)
        return Measured([tokens + max(regions, 1) * self.answers.slot_limit * self.answers.copies])

    def sample(self, record: int, unit: int, seed: str) -> dict[str, Any]:
        scene = draw_scene(self.seed, record)
        if self._is_conversation(record):
            return self._question(scene, seed)
        captions = [item.caption for item in scene.objects]
        return {"image": scene.image, "masks": [item.mask for item in scene.objects], "captions": captions}

    def _question(self, scene: Scene, seed: str) -> dict[str, Any]:
        turns = scene_conversation(scene)
        question, answer = turns[int(random.Random(f"question/{seed}").random() * len(turns))]
        return {"images": [scene.image], "prompt": question, "answer": answer}

    def _is_conversation(self, record: int) -> bool:
        return random.Random(f"sample/{self.seed}/{record}").random() < self.share
