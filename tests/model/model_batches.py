"""Batches of the drawn scene for tiny models, and what decoding makes of them."""

import torch

from perceptiondlm.inputs_perceptiondlm import PromptInputs
from perceptiondlm.training.data.noise import stratified_noise


LAYOUTS = ("isolated", "released", "full")
CONDITIONINGS = ("replay", "vision")
SLOTS = 6


def masks_of(scene) -> list:
    return [item.mask for item in scene.objects]


def region_batch(processor, scene, **kwargs):
    """The scene's regions as model inputs."""
    return processor(images=scene.image, masks=masks_of(scene), **kwargs)


def region_tensors(batch) -> dict[str, torch.Tensor]:
    """The prompt's tensors of a batch."""
    return {name: value for name, value in batch.items() if name in PromptInputs.tensor_names()}


def training_batch(processor, scene, copies: int = 2) -> dict[str, torch.Tensor]:
    """The scene as a training batch: noised copies of every caption."""
    labels = processor.encode_answers([item.caption for item in scene.objects], 32).repeat_interleave(copies, dim=0)
    p, u = stratified_noise(len(scene.objects), 32, copies, seed="0")
    batch = dict(region_batch(processor, scene))
    return batch | {"labels": labels, "mask_probability": p, "answer_noise": u}


def half_masked(model, num_answers: int, num_slots: int = SLOTS, seed: int = 0) -> torch.Tensor:
    """A random canvas (A, G) in the middle of decoding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 500, (num_answers, num_slots), generator=generator)
    return ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.5, model.config.mask_token_id)


def generate(model, batch, **settings):
    return model.generate(**batch, **{"max_new_tokens": SLOTS, "steps": SLOTS, **settings})


class Recorder:
    """A streamer that keeps every draft."""

    def __init__(self):
        self.drafts, self.ended = [], 0

    def put_draft(self, ids):
        self.drafts.append(ids.clone())

    def end(self):
        self.ended += 1


def drafts_of(model, batch, **settings):
    """Which slots are decided after each step (list of (A, G) bool), and the drafts themselves."""
    recorder = Recorder()
    output = generate(model, batch, streamer=recorder, suppress_tokens=[model.config.mask_token_id], **settings)
    assert recorder.ended == 1
    assert len(recorder.drafts) == output.num_forward_passes
    assert torch.equal(recorder.drafts[-1], output.sequences)
    return [draft != model.config.mask_token_id for draft in recorder.drafts], recorder.drafts


def user(*parts):
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": "user", "content": content}


def chat(processor, messages):
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
