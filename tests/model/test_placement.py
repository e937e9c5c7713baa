"""Parts of a model on different devices: offloaded to CPU memory or disk, or spread over accelerators.

No accelerator is needed: offloading hooks run on the CPU, and several GPUs are stood in for by PyTorch's fake tensors,
which compute nothing but refuse operations across devices as real ones do.
"""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import attach_align_device_hook_on_blocks
from model_batches import masks_of
from model_passes import embed
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perceptiondlm import language_perceptiondlm
from perceptiondlm.attention_perceptiondlm import StaticPass
from perceptiondlm.cache_perceptiondlm import KeyValues
from perceptiondlm.modeling_perceptiondlm import scatter_features


SETTINGS = {"max_new_tokens": 6, "steps": 6}


@pytest.mark.parametrize("conditioning", ["replay", "vision"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_change_no_token(tiny_model, tiny_processor, scene, tmp_path, conditioning, where):
    """Every weight lies elsewhere until its module is called."""
    model, offloaded = (tiny_model(region_conditioning=conditioning) for _ in range(2))
    batch = tiny_processor(model)(images=scene.image, masks=masks_of(scene))
    if where == "cpu":
        cpu_offload(offloaded, execution_device=torch.device("cpu"), offload_buffers=True)
    else:
        disk_offload(offloaded, str(tmp_path), execution_device=torch.device("cpu"), offload_buffers=True)
    assert {weight.device.type for weight in offloaded.parameters()} == {"meta"}
    found, expected = offloaded.generate(**batch, **SETTINGS), model.generate(**batch, **SETTINGS)
    assert torch.equal(found.sequences, expected.sequences)
    question = tiny_processor(model)(images=scene.image, text="How many objects are there?")
    expected = model.generate(**question, **SETTINGS).sequences
    assert torch.equal(offloaded.generate(**question, **SETTINGS).sequences, expected)


def test_weights_offloaded_while_loading(tiny_model, tiny_processor, scene, tmp_path):
    """`from_pretrained(device_map=...)` with parts on disk."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    batch = tiny_processor(model)(images=scene.image, masks=masks_of(scene))
    places = {"vision_tower": "disk", "projector": "cpu", "region_replay": "disk", "lm_head": "cpu"}
    places |= {"language_model.embed_tokens": "cpu", "language_model.rotary_emb": "cpu", "language_model.norm": "disk"}
    places |= {"language_model.layers.0": "cpu", "language_model.layers.1": "disk"}
    loaded = (
        type(model)
        .from_pretrained(tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offloaded"))
        .eval()
    )
    expected = model.generate(**batch, **SETTINGS).sequences
    assert torch.equal(loaded.generate(**batch, **SETTINGS).sequences, expected)


@pytest.fixture
def spread(tiny_model, scene, tiny_processor):
    """A language model whose layers and head lie on three pretended GPUs, the prompt of a batch, and the mode."""
    model = tiny_model()
    prompt = embed(model, tiny_processor(model)(images=scene.image, masks=masks_of(scene)))
    shared, spans = prompt.shared(0), prompt.spans()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        language = model.language_model
        language.rotary_emb = PretendedRotation(language.config.head_dim)
        places = {"embed_tokens": 0, "layers.0": 0, "layers.1": 1, "norm": 1}
        places = {name: torch.device("cuda", index) for name, index in places.items()}
        for name, device in places.items():
            fake_on(language.get_submodule(name), device)
        attach_align_device_hook_on_blocks(language, execution_device=places, offload=dict.fromkeys(places, False))
        head = fake_on(model.lm_head, torch.device("cuda", 2))
        attach_align_device_hook_on_blocks(head, execution_device={"": torch.device("cuda", 2)}, offload={"": False})
        tensors = [torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda:0") for tensor in (*shared[1:], *spans)]
    return model, mode, tensors


class PretendedRotation(torch.nn.Module):
    """Cosines and sines by shape: fake tensors do not go through the kernels of the real ones."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, hidden, position_ids):
        return tuple(hidden.new_empty(*position_ids.shape, self.width) for _ in range(2))


def fake_on(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The module with fake weights and buffers on a device."""
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            fake = torch.empty(weight.shape, dtype=weight.dtype, device=device)
            part._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
        for name, buffer in list(part.named_buffers(recurse=False)):
            part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return module


@torch.no_grad()
def test_layers_and_cache_on_several_accelerators(spread, monkeypatch):
    """Keys and values stay where their layer is; hidden states travel to the next layer and to the head."""
    model, mode, (shared, shared_positions, spans, span_positions) = spread
    monkeypatch.setattr(language_perceptiondlm, "apply_rotary_pos_emb", lambda query, key, cos, sin: (query, key))
    with mode:
        prefix, own = KeyValues(2), KeyValues(2)
        model.language_model.fill(shared, shared_positions, StaticPass([(None, 1)], keep=prefix))
        model.language_model.fill(spans, span_positions, StaticPass([(prefix, 3)], keep=own))
        for kept in (prefix, own):
            assert [key.device.index for key, _ in kept.layers] == [0, 1]
        answers, positions = (tensor.narrow(0, 0, 2).narrow(1, 0, 7) for tensor in (spans, span_positions))
        attending = StaticPass([(prefix, 2)], own, torch.tensor([0, 2], device="cuda:0"))
        hidden = model.language_model(answers, positions, attending)
        assert hidden.shape == answers.shape
        logits = model.lm_head(hidden.flatten(0, 1).narrow(0, 0, 4))
        assert logits.shape == (4, model.config.text_config.vocab_size)


def test_pretended_devices_do_not_mix(spread):
    """What the test above relies on."""
    with spread[1], pytest.raises(FakeTensorDeviceMismatchError):
        torch.empty(2, 2, device="cuda:0") @ torch.empty(2, 2, device="cuda:1")


def test_image_and_roi_features_come_to_the_text(spread):
    """The tower may lie elsewhere than the embeddings."""
    with spread[1]:
        embeds = torch.empty(1, 9, 4, device="cuda:0")
        features = torch.empty(2, 4, device="cuda:1")
        places = torch.empty(1, 9, 1, dtype=torch.bool, device="cuda:0")
        assert embeds.masked_scatter(places, features.to(embeds)).device.index == 0
    real = torch.zeros(1, 3, 2)
    found = scatter_features(real, torch.tensor([[True, False, True]]), torch.ones(2, 2, dtype=torch.float64), "image")
    assert found.dtype == torch.float32


class NoDoubles(TorchDispatchMode):
    """Refuses what some accelerators (Apple's MPS) do not have: tensors in double precision."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                assert leaf.dtype != torch.float64, function
        return result


@pytest.mark.parametrize(
    "settings", [{}, {"preset": "fast"}, {"temperature": 0.8, "top_p": 0.9, "seed": 1}, {"shared_schedule": True}]
)
def test_nothing_is_computed_in_double_precision(tiny_model, tiny_processor, scene, settings):
    model = tiny_model()
    batch = tiny_processor(model)(images=scene.image, masks=masks_of(scene))
    with NoDoubles():
        model.generate(**batch, **SETTINGS, **settings)
        labels = torch.randint(0, 500, (3, 6))
        model(**batch, labels=labels)


def test_a_generator_may_live_elsewhere_than_the_logits(tiny_model, tiny_processor, scene):
    """Draws are made where the generator is; a seed gives the same tokens as a CPU generator of that seed."""
    model = tiny_model()
    batch = tiny_processor(model)(images=scene.image, masks=masks_of(scene))
    settings = {"temperature": 1.5, **SETTINGS}
    by_seed = model.generate(**batch, seed=3, **settings).sequences
    by_generator = model.generate(**batch, generator=torch.Generator().manual_seed(3), **settings).sequences
    assert torch.equal(by_seed, by_generator)
    assert not torch.equal(by_seed, model.generate(**batch, seed=4, **settings).sequences)
