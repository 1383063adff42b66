import dataclasses
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

import personalization.stack
from engine.adapter_files import LoraModule, LoraWeights, write_adapter
from engine.model import MODULES, module_shape
from personalization.prompt import Example
from personalization.score import token_losses
from personalization.stack import AdapterShape, AdapterStack, RowAttention
from personalization.train import (
    InvalidRecipe,
    Person,
    Recipe,
    Step,
    _batches,
    _stacks,
    best_dtype,
    plan,
    train,
)
from tests.small_model import CONFIG, habits, small_model

RECIPE = Recipe(rank=4, alpha=8, learning_rate=5e-3, epochs=3, tokens_per_step=32)


def flat(weights: LoraWeights) -> Tensor:
    return torch.cat([part.flatten() for m in weights.modules for part in (m.a, m.b)])


def mean_loss(model, rows, adapter) -> float:
    return torch.cat(token_losses(model, rows, adapter)).mean().item()


def random_adapter(seed: int, rank: int = 4, modules=MODULES, scale: float = 2.0) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)
    return LoraWeights(
        tuple(
            LoraModule(
                layer,
                module,
                torch.randn(rank, module_shape(CONFIG, module)[1], generator=generator) * 0.1,
                torch.randn(module_shape(CONFIG, module)[0], rank, generator=generator) * 0.1,
                scale,
            )
            for layer in range(CONFIG.num_layers)
            for module in MODULES
            if module in modules
        )
    )


def test_training_lowers_the_loss_on_rows_it_has_not_seen():
    model = small_model()
    rows = habits(3, 40)
    (trained,) = train(model, [Person(rows[:30], seed=7)], RECIPE)
    assert mean_loss(model, rows[30:], trained.weights) < mean_loss(model, rows[30:], None) - 0.5
    assert trained.last_loss < trained.first_loss
    assert trained.steps > 0
    assert trained.error is None


def test_a_person_in_a_stack_of_ragged_others_learns_what_they_learn_alone():
    model = small_model()
    people = [
        Person(habits(seed, count, length=(2, 4 + 5 * seed)), seed=seed)
        for seed, count in enumerate((30, 3, 17, 25, 8), 1)
    ]
    together = train(model, people, RECIPE)
    for person, in_stack in zip(people, together, strict=True):
        (alone,) = train(model, [person], RECIPE)
        assert alone.steps == in_stack.steps
        torch.testing.assert_close(flat(in_stack.weights), flat(alone.weights), rtol=0, atol=2e-5)
        held_out = habits(person.seed, 60)[50:]
        assert (
            abs(mean_loss(model, held_out, alone.weights) - mean_loss(model, held_out, in_stack.weights))
            < 1e-4
        )


def test_in_bfloat16_stacked_and_alone_agree_on_held_out_loss():
    model = small_model(dtype=torch.bfloat16)
    judge = small_model()
    people = [Person(habits(seed, 20), seed=seed) for seed in range(4)]
    together = train(model, people, RECIPE)
    for person, in_stack in zip(people, together, strict=True):
        (alone,) = train(model, [person], RECIPE)
        held_out = habits(person.seed, 60)[40:]
        base = mean_loss(judge, held_out, None)
        first, second = (mean_loss(judge, held_out, each.weights) for each in (alone, in_stack))
        assert first < base - 0.3
        assert abs(first - second) < 0.03  # rounding to 8 bits, amplified by a model of 32 channels


def test_batches_lie_as_their_steps_say():
    def example(first: int, learned: str) -> Example:
        return Example(tuple(range(first, first + len(learned))), tuple(mark == "x" for mark in learned))

    one, two, three = example(10, ".xx"), example(20, ".x.xxx.x"), example(40, "..x")
    steps = [[Step((one, two), 0, (1.0, 2.0)), None, Step((three,), 0)], [Step((two,), 0)]]
    batches = _batches(steps, {}, torch.device("cpu"))
    first, second = batches
    assert first.token_ids.view(3, 16).tolist() == [
        [10, 11, 12, *range(20, 28), 0, 0, 0, 0, 0],
        [0] * 16,
        [40, 41, 42, *[0] * 13],
    ]
    assert first.positions.tolist()[0] == [0, 1, 2, *range(8), 0, 0, 0, 0, 0]
    assert first.segments.tolist()[0] == [0] * 3 + [1] * 8 + [-1] * 5
    assert first.segments.tolist()[1] == [-1] * 16
    assert first.bounds.tolist() == [0, 3, 11, 16, 32, 35, 48]
    assert first.longest == 16
    assert first.loss_at.tolist() == [0, 1, 3, 5, 6, 7, 9, 33]
    assert first.targets.tolist() == [11, 12, 21, 23, 24, 25, 27, 42]
    assert first.people.tolist() == [0] * 7 + [2]
    assert first.weights.tolist() == pytest.approx([1 / 12] * 2 + [1 / 6] * 5 + [1])
    assert (second.bounds.tolist(), second.longest) == ([0, 8], 8)
    assert second.loss_at.tolist() == [0, 2, 3, 4, 6]
    assert second.weights.sum() == pytest.approx(1)


def test_stacks_of_any_size_give_the_same():
    model = small_model()
    people = [Person(habits(seed, 6 + seed), seed=seed) for seed in range(5)]
    one_stack, three_stacks = (train(model, people, RECIPE, people_at_once=n) for n in (5, 2))
    for first, second in zip(one_stack, three_stacks, strict=True):
        torch.testing.assert_close(flat(first.weights), flat(second.weights), rtol=0, atol=2e-5)


def test_lanes_on_several_cores_give_the_same():
    model = small_model()
    people = [Person(habits(seed, 3 + seed), seed=seed) for seed in range(9)]
    (alone,) = train(model, people[3:4], RECIPE)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        lanes = train(model, people, RECIPE, people_at_once=8)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(flat(lanes[3].weights), flat(alone.weights), rtol=0, atol=2e-5)


def test_stacks_are_of_equal_work_and_of_neighbours_in_length():
    steps = [5, 40, 6, 38, 7, 36, 8, 34]
    stacks, lanes = _stacks(steps, 8, 2)
    assert lanes == 2
    assert [[steps[index] for index in stack] for stack in stacks] == [[40, 38, 36], [34, 8, 7, 6, 5]]
    assert _stacks(steps, 1, 1) == ([[1], [3], [5], [7], [6], [4], [2], [0]], 1)
    assert [len(stack) for stack in _stacks([3] * 10, 4, 1)[0]] == [4, 3, 3]
    assert _stacks([], 8, 2) == ([], 1)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not():
    model = small_model()
    rows = habits(1, 10)
    runs = [train(model, [Person(rows, seed=seed)] * 2, RECIPE) for seed in (5, 5, 6)]
    assert torch.equal(flat(runs[0][0].weights), flat(runs[1][0].weights))
    assert not torch.equal(flat(runs[0][0].weights), flat(runs[2][0].weights))


@pytest.mark.parametrize("modules", [MODULES, ("q_proj", "v_proj"), ("k_proj", "up_proj", "down_proj")])
@pytest.mark.parametrize(("window", "block"), [(None, 256), (5, 256), (None, 4), (5, 4)])
def test_gradients_equal_those_of_autograd_through_each_person_alone(modules, window, block, monkeypatch):
    monkeypatch.setattr(personalization.stack, "_QUERY_BLOCK", block)  # of eleven rows: one, or three
    config = CONFIG
    if window:
        config = dataclasses.replace(CONFIG, sliding_window=window, sliding_layers=(0,))
    model = small_model(config)
    shape = AdapterShape(config, modules, 3, 6.0)
    starts = [random_adapter(seed, 3, modules) for seed in (1, 2)]
    stack = AdapterStack(shape, shape.rows(starts, [0, 0], torch.device("cpu")), torch.float32)
    length = 11
    ids = torch.randint(0, 61, (2, length), generator=torch.Generator().manual_seed(4))
    positions = torch.arange(length).expand(2, length)
    segments, bounds = torch.zeros(2, length, dtype=torch.long), torch.tensor([0, length, 2 * length])
    attend = RowAttention(segments, positions, bounds, length, config, torch.float32)
    hidden = model.decoder(ids.flatten(), positions.flatten(), attend, stack)
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5))
    hidden.backward(upstream)
    stack.gradient_norms()

    for person, start in enumerate(starts):
        leaves = {
            (m.layer, m.module): (m.a.clone().requires_grad_(), m.b.clone().requires_grad_())
            for m in start.modules
        }
        expected = plain_forward(model, ids[person], leaves, 2.0, window)
        torch.testing.assert_close(hidden.view(2, length, -1)[person], expected, rtol=1e-4, atol=1e-5)
        expected.backward(upstream.view(2, length, -1)[person])
        got = shape.weights(stack._gradient[person : person + 1])[0]
        for module in got.modules:
            a, b = leaves[module.layer, module.module]
            torch.testing.assert_close(module.a, a.grad, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(module.b, b.grad, rtol=1e-3, atol=1e-5)


def plain_forward(model, ids, leaves, scale, window):
    """The decoder on one sequence with LoRA by autograd's own products."""
    from engine.model import GROUP_MODULES

    def lora(layer, group, x, y):
        parts = []
        for module in GROUP_MODULES[group]:
            out = module_shape(CONFIG, module)[0]
            a, b = leaves.get((layer, module), (None, None))
            parts.append(torch.zeros(len(x), out) if a is None else scale * (x @ a.t()) @ b.t())
        return y + torch.cat(parts, -1)

    def attend(layer, q, k, v):
        age = torch.arange(len(ids))[:, None] - torch.arange(len(ids))
        seen = age >= 0
        if window and layer == 0:
            seen &= age < window
        q, k, v = (x.transpose(0, 1) for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
        scores = (q @ k.mT) / math.sqrt(q.shape[-1])
        return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1)

    return model.decoder(ids, torch.arange(len(ids)), attend, lora)


def test_examples_in_one_row_do_not_see_each_other():
    model = small_model()
    rows = habits(2, 3)
    apart = [Person([row], seed=1) for row in rows]
    recipe = dataclasses.replace(RECIPE, epochs=1, tokens_per_step=200)
    (trained,) = train(model, [Person(rows, seed=1)], recipe)
    weight = [sum(row.learn_mask[1:]) for row in rows]
    losses = [each.first_loss for each in train(model, apart, recipe)]
    expected = sum(w * loss for w, loss in zip(weight, losses, strict=True)) / sum(weight)
    assert trained.steps == 1
    assert trained.first_loss == pytest.approx(expected, abs=1e-5)


def test_only_learned_tokens_count():
    model = small_model()
    row = habits(2, 1)[0]
    first_learned = row.learn_mask.index(True)
    changed_past = Example((*row.token_ids[:-1], row.token_ids[-1]), row.learn_mask)
    (trained,) = train(model, [Person([row], seed=1)], dataclasses.replace(RECIPE, epochs=1))
    expected = torch.cat(token_losses(model, [changed_past], None))
    assert len(expected) == len(row.token_ids) - first_learned
    assert trained.first_loss == pytest.approx(expected.mean().item(), abs=1e-5)


def test_someone_whose_numbers_break_stops_alone():
    model = small_model()
    sound = Person(habits(1, 12), seed=1)
    poisoned = LoraWeights(
        tuple(dataclasses.replace(m, b=torch.full_like(m.b, torch.nan)) for m in random_adapter(3).modules)
    )
    broken = Person(habits(2, 12), seed=2, start=poisoned)
    whole, stopped = train(model, [sound, broken], RECIPE)
    (alone,) = train(model, [sound], RECIPE)
    assert stopped.error is not None
    assert stopped.error.startswith("step 1: expected finite numbers")
    assert stopped.steps == 0
    assert whole.error is None
    torch.testing.assert_close(flat(whole.weights), flat(alone.weights), rtol=0, atol=2e-5)


def test_a_pull_keeps_the_weights_near_their_start_and_one_step_is_as_written():
    model = small_model()
    start = random_adapter(1)
    rows = habits(1, 12)
    free, pulled = (
        train(model, [Person(rows, seed=1, start=start)], dataclasses.replace(RECIPE, pull=pull))[0]
        for pull in (0.0, 50.0)
    )
    moved = [(flat(each.weights) - flat(start)).norm() for each in (free, pulled)]
    assert moved[1] < 0.7 * moved[0]
    # The first step begins at the start, so a pull changes nothing yet.
    once = dataclasses.replace(RECIPE, epochs=1, tokens_per_step=400)
    (one,) = train(model, [Person(rows, seed=1, start=start)], once)
    (other,) = train(model, [Person(rows, seed=1, start=start)], dataclasses.replace(once, pull=50.0))
    assert torch.equal(flat(one.weights), flat(other.weights))


def test_an_example_without_emphasis_is_not_learned_from():
    model = small_model()
    own, others = habits(1, 10), habits(2, 10)
    recipe = dataclasses.replace(RECIPE, tokens_per_step=2048, epochs=6)
    heard = Person([*own, *others], seed=1, emphasis=[1.0] * 10 + [1e-6] * 10)
    (emphasized,) = train(model, [heard], recipe)
    (alone,) = train(model, [Person(own, seed=1)], recipe)
    torch.testing.assert_close(flat(emphasized.weights), flat(alone.weights), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="emphasis: expected one for each of 20 examples, got 3"):
        train(model, [dataclasses.replace(heard, emphasis=[1.0] * 3)], recipe)
    with pytest.raises(ValueError, match="emphasis: expected positive numbers"):
        train(model, [dataclasses.replace(heard, emphasis=[1.0] * 19 + [0.0])], recipe)


def test_people_of_one_stack_may_have_recipes_of_their_own():
    model = small_model()
    quick = dataclasses.replace(RECIPE, learning_rate=1e-2, epochs=1, clip=0.5, pull=3.0)
    people = [Person(habits(1, 12), seed=1, recipe=quick), Person(habits(2, 12), seed=2)]
    together = train(model, people, RECIPE)
    for person, in_stack in zip(people, together, strict=True):
        (alone,) = train(model, [dataclasses.replace(person, recipe=None)], person.recipe or RECIPE)
        assert alone.steps == in_stack.steps
        torch.testing.assert_close(flat(in_stack.weights), flat(alone.weights), rtol=0, atol=2e-5)
    other_rank = dataclasses.replace(people[0], recipe=dataclasses.replace(RECIPE, rank=2))
    with pytest.raises(InvalidRecipe, match="rank: expected the stack's 4, got 2"):
        train(model, [other_rank], RECIPE)


def test_nobody_to_train_is_nothing_to_do():
    assert train(small_model(), [], RECIPE) == []


def test_a_person_without_anything_to_learn_keeps_the_start():
    model = small_model()
    start = random_adapter(1)
    unlearned = Example((1, 2, 3), (True, False, False))
    (trained,) = train(model, [Person([unlearned], seed=1, start=start)], RECIPE)
    assert trained.steps == 0
    assert math.isnan(trained.first_loss)
    torch.testing.assert_close(flat(trained.weights), flat(start))


def test_training_begins_where_the_serving_version_stands():
    model = small_model()
    start = random_adapter(1)
    rows = habits(1, 8)
    (trained,) = train(
        model, [Person(rows, seed=1, start=start)], dataclasses.replace(RECIPE, epochs=1, tokens_per_step=400)
    )
    assert trained.steps == 1
    assert trained.first_loss == pytest.approx(mean_loss(model, rows, start), abs=1e-4)


@pytest.mark.parametrize(("rank", "exact"), [(2, True), (4, True), (9, False)])
def test_a_start_of_another_rank_and_scale_is_fitted(rank, exact):
    start = random_adapter(1, rank, scale=0.7)
    shape = AdapterShape(CONFIG, MODULES, 4, 8.0)
    fitted = shape.weights(shape.rows([start], [0], torch.device("cpu")))[0]
    for before, after in zip(start.modules, fitted.modules, strict=True):
        delta, kept = before.scale * before.b @ before.a, after.scale * after.b @ after.a
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        nearest = (left[:, :4] * values[:4]) @ right[:4]
        torch.testing.assert_close(kept, delta if exact else nearest, rtol=1e-3, atol=1e-5)
        assert after.a.shape[0] == 4
        if rank < 4:
            assert (after.a[rank:].abs().amax(1) > 0).all()  # a zero row would never learn


def test_the_best_watched_epoch_is_kept_and_a_worse_one_ends_the_run():
    model = small_model()
    rows = habits(4, 12)
    nothing_alike = [Example(row.token_ids[::-1], row.learn_mask) for row in habits(9, 6)]
    recipe = dataclasses.replace(RECIPE, epochs=8, learning_rate=2e-2)
    watched, free = train(model, [Person(rows, seed=1, watch=nothing_alike), Person(rows, seed=1)], recipe)
    assert watched.steps < free.steps
    assert mean_loss(model, nothing_alike, watched.weights) < mean_loss(model, nothing_alike, free.weights)


def test_progress_rises_to_one():
    shares: list[float] = []
    train(
        small_model(),
        [Person(habits(s, 4 + s), seed=s) for s in range(3)],
        RECIPE,
        people_at_once=2,
        on_progress=shares.append,
    )
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_every_epoch_of_the_plan_holds_every_example_once_in_bins_that_fit():
    rows = habits(5, 25)
    steps = plan(rows, RECIPE, seed=3)
    for epoch in range(RECIPE.epochs):
        seen = [e for step in steps if step.epoch == epoch for e in step.examples]
        assert Counter(seen) == Counter(rows)
    assert max(step.tokens for step in steps) <= RECIPE.tokens_per_step
    assert sum(step.tokens for step in steps) > 0.8 * RECIPE.tokens_per_step * len(steps)
    orders = [[e for step in steps if step.epoch == epoch for e in step.examples] for epoch in range(2)]
    assert orders[0] != orders[1]


def test_no_epoch_is_begun_that_would_end_after_the_most_steps_but_the_first_is_whole():
    rows = habits(5, 25)
    whole = plan(rows, RECIPE, seed=3)
    one = sum(step.epoch == 0 for step in whole)
    for most, epochs in ((1, 1), (one, 1), (2 * one + 2, 2), (None, 3)):
        steps = plan(rows, dataclasses.replace(RECIPE, most_steps=most), seed=3)
        assert steps == whole[: len(steps)]
        assert steps[-1].epoch == epochs - 1


def test_an_example_longer_than_a_step_is_cut_and_nothing_learned_is_lost_but_first_tokens():
    long = Example(tuple(range(1, 51)), (False,) * 20 + (True,) * 30)
    steps = plan([long], dataclasses.replace(RECIPE, epochs=1, tokens_per_step=16), seed=1)
    pieces = sorted((e for step in steps for e in step.examples), key=lambda e: e.token_ids)
    assert [e.token_ids[0] for e in pieces] == [17, 33, 49]
    assert all(len(e.token_ids) <= 16 for e in pieces)


def test_bfloat16_is_chosen_only_where_the_processor_multiplies_it(tmp_path: Path):
    cpuinfo = tmp_path / "cpuinfo"
    cpu = torch.device("cpu")
    cpuinfo.write_text("processor : 0\nflags\t\t: fpu avx2 avx512_bf16\n")
    assert best_dtype(cpu, cpuinfo) is torch.bfloat16
    cpuinfo.write_text("processor : 0\nflags\t\t: fpu avx2 avx512f\n")
    assert best_dtype(cpu, cpuinfo) is torch.float32
    assert best_dtype(cpu, tmp_path / "none") is torch.float32


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 0),
        ("epochs", 0),
        ("learning_rate", 0.0),
        ("modules", ("lm_head",)),
        ("warmup", 1.0),
        ("pull", -1.0),
    ],
)
def test_a_recipe_out_of_range_names_its_field(field, value):
    with pytest.raises(InvalidRecipe, match=f"^{field}: expected"):
        Recipe(**{field: value})


# PEFT asks transformers for a property that transformers wants to rename
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_gradients_equal_those_of_peft(tmp_path: Path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    from engine.weights import load_model

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, max_position_embeddings=256,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    start = random_adapter(3)
    write_adapter(tmp_path / "adapter", start, model.config, base_model="base")
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32),
        tmp_path / "adapter",
        is_trainable=True,
    )
    row = habits(1, 1, length=(18, 18))[0]
    labels = [token if learn else -100 for token, learn in zip(row.token_ids, row.learn_mask, strict=True)]
    loss = theirs(input_ids=torch.tensor([row.token_ids]), labels=torch.tensor([labels])).loss
    loss.backward()
    rate = 1e-3
    torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=rate, betas=(0.9, 0.99), weight_decay=0.0
    ).step()

    recipe = Recipe(rank=4, alpha=8, learning_rate=rate, epochs=1, warmup=0.0, clip=1e9, tokens_per_step=64)
    (trained,) = train(model, [Person([row], seed=1, start=start)], recipe)
    assert trained.first_loss == pytest.approx(loss.item(), abs=1e-5)
    state = {name: value for name, value in theirs.named_parameters() if value.requires_grad}
    for module in trained.weights.modules:
        for half, ours in (("A", module.a), ("B", module.b)):
            (name,) = (
                n for n in state if f"layers.{module.layer}." in n and f"{module.module}.lora_{half}" in n
            )
            torch.testing.assert_close(ours, state[name].detach(), rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("pull", [0.0, 3.0])
def test_a_gpu_trains_what_a_processor_trains(window, pull):
    """From given weights, so that the two devices' own random numbers play no part; two people of unlike
    length, one of them with modules of another rank, judged on the processor."""
    config = CONFIG
    if window:
        config = dataclasses.replace(CONFIG, sliding_window=window, sliding_layers=(0,))
    recipe = dataclasses.replace(RECIPE, pull=pull)
    judge = small_model(config)
    people = [
        Person(habits(seed, count), seed=seed, start=random_adapter(seed, rank))
        for seed, count, rank in ((1, 25, RECIPE.rank), (2, 9, RECIPE.rank), (3, 30, RECIPE.rank + 3))
    ]
    expected = train(judge, people, recipe)
    for dtype, error in ((torch.float32, 1e-3), (torch.bfloat16, 0.05)):
        model = small_model(config, dtype=dtype)
        model.decoder.to("cuda")
        trained = train(model, people, recipe)
        again = train(model, people, recipe)
        for person, one, other, known in zip(people, trained, again, expected, strict=True):
            assert torch.equal(flat(one.weights), flat(other.weights))
            assert one.steps == known.steps
            assert one.first_loss == pytest.approx(known.first_loss, abs=error)
            held_out = habits(person.seed, 60)[40:]
            first, second = (mean_loss(judge, held_out, each.weights) for each in (one, known))
            assert abs(first - second) < error


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_someone_whose_numbers_break_stops_alone():
    model = small_model()
    model.decoder.to("cuda")
    nan = tuple(dataclasses.replace(m, b=torch.full_like(m.b, torch.nan)) for m in random_adapter(3).modules)
    sound = Person(habits(1, 12), seed=1)
    whole, stopped = train(model, [sound, Person(habits(2, 12), seed=2, start=LoraWeights(nan))], RECIPE)
    (alone,) = train(model, [sound], RECIPE)
    assert stopped.error is not None
    assert whole.error is None
    torch.testing.assert_close(flat(whole.weights), flat(alone.weights), rtol=0, atol=2e-4)
