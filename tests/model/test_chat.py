"""Questions without regions: text, images and several turns."""

import itertools

import pytest
import torch
from model_batches import (
    LAYOUTS,
    SLOTS,
    chat,
    generate,
    half_masked,
    user,
)
from model_passes import scores

from perceptiondlm.drawn.scenes import draw_scene


def test_text_alone_is_answered(replay, tiny_processor):
    processor = tiny_processor(replay)
    inputs = chat(processor, [{"role": "user", "content": "What is a car?"}])
    assert "pixel_values" not in inputs
    assert torch.equal(inputs["input_ids"], processor(text="What is a car?")["input_ids"])
    output = generate(replay, inputs)
    assert output.sequences.shape == (1, SLOTS)
    assert output.sample_ids.tolist() == [0]
    assert processor.post_process_image_text_to_text(output) == [
        answer["text"] for answer in processor.decode_answers(output)
    ]


def test_the_answer_depends_on_image_and_question(replay, tiny_processor, scene):
    processor = tiny_processor(replay)
    other = draw_scene(0, scene.index + 1).image.resize(scene.image.size)
    asked = [("How many?", scene.image), ("What color?", scene.image), ("How many?", other)]
    logits = [
        scores(replay, processor(images=image, text=question), half_masked(replay, 1)) for question, image in asked
    ]
    for one, another in itertools.combinations(logits, 2):
        assert (one - another).abs().max() > 1e-2


def test_two_images_and_several_turns(replay, tiny_processor, scene, pictures):
    processor = tiny_processor(replay)
    images = [scene.image, pictures[0].image]
    messages = [
        {"role": "system", "content": "Be brief."},
        user(images[0], "What is this?"),
        {"role": "assistant", "content": "a car"},
        user("And this?", images[1]),
    ]
    inputs = chat(processor, messages)
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    first, rest = text.split("<|eot_id|>\n", 2)[1:]
    assert "<img>" in first
    assert rest.index("a car") < rest.index("And this?") < rest.index("<img>")
    assert rest.endswith("<|start_header_id|>assistant<|end_header_id|>\n")
    image_tokens = int((inputs["input_ids"] == replay.config.image_token_id).sum())
    assert image_tokens == len(inputs["pixel_values"]) * processor.config.tokens_per_side**2
    assert len(inputs["tile_grids"]) == 2
    ids = half_masked(replay, 1)
    swapped = dict(inputs)
    swapped["pixel_values"] = inputs["pixel_values"].flip(0)
    assert (scores(replay, inputs, ids) - scores(replay, swapped, ids)).abs().max() > 1e-2
    cached, uncached = (generate(replay, inputs, use_cache=use, block_length=3) for use in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    assert cached.num_forward_passes == SLOTS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_questions_in_a_batch_get_the_answers_they_get_alone(tiny_model, tiny_processor, scene, pictures, layout):
    """Texts of different lengths, with no, one and two images."""
    model = tiny_model(attention_layout=layout)
    processor = tiny_processor(model)
    texts = ["Why?", "What can be seen in this picture, and where is it?", "What do these two have in common?"]
    images = [[], [scene.image], [pictures[0].image, pictures[-1].image]]
    inputs = processor(images=images, text=texts)
    assert len(set(inputs["attention_mask"].sum(dim=1).tolist())) == 3
    together = generate(model, inputs)
    assert together.sample_ids.tolist() == [0, 1, 2]
    ids = half_masked(model, 3)
    logits = scores(model, inputs, ids)
    for index in range(3):
        single = processor(images=[images[index]] if images[index] else None, text=[texts[index]])
        assert torch.equal(generate(model, single).sequences[0], together.sequences[index])
        alone = scores(model, single, ids[index : index + 1])[0]
        torch.testing.assert_close(alone, logits[index], atol=1e-4, rtol=0)


def test_answers_are_decoded_up_to_their_end(replay, tiny_processor):
    """Text and score stop at the end token, which counts as decided; what follows it is filler."""
    processor = tiny_processor(replay)
    end, fill = replay.config.end_of_turn_token_id, replay.config.end_of_text_token_id
    car, red = (processor.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" car", " red"))

    class Output:
        sequences = torch.tensor([[car, red, end, red], [fill, car, car, car], [car, car, red, red]])
        confidences = torch.tensor([[0.5, 0.7, 0.9, 0.1], [0.4, 1.0, 1.0, 1.0], [0.1, 0.2, 0.3, 0.4]])
        sample_ids = torch.tensor([0, 0, 1])

    words = [processor.tokenizer.decode(ids).strip() for ids in ([car, red], [], [car, car, red, red])]
    answers = processor.decode_answers(Output)
    assert [answer["text"] for answer in answers] == words
    assert [answer["score"] for answer in answers] == pytest.approx([0.7, 0.4, 0.25])
    scored = processor.post_process_region_captions(Output, output_scores=True)
    assert [[item["caption"] for item in image] for image in scored] == [words[:2], words[2:]]
