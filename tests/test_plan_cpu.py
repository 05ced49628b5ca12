"""Plans of training on a CPU, whose RAM all workers share and whose passes are parts of a micro-batch."""

import pytest
from by_hand import FACTS, GIB
from test_plan_training import CPU, hand_items, reason

from cluster.catalog import find
from cluster.hardware import declared
from cluster.plan import DoesNotFit, plan_training


def test_smollm2_on_this_kind_of_cpu() -> None:
    plan = plan_training(find("smollm2-135m-instruct"), CPU)
    assert (plan.method, plan.precision, plan.compute_dtype, plan.num_workers) == ("lora", "fp32", "float32", 2)
    one = hand_items("smollm2-135m-instruct", micro=1, checkpointing=False)  # one sample of 1,024 tokens at once
    one["gradient buckets"] = one["gradients"]  # DDP's own copy
    assert (plan.micro_batch_size, plan.gradient_accumulation_steps) == (32, 1)
    assert plan.memory.total_bytes == pytest.approx(2 * sum(one.values()), abs=256)


@pytest.mark.parametrize(
    ("micro", "length", "tokens"),
    [
        (4, 512, 512),  # four passes of one sample
        (8, 128, 384),  # three of three or two
        (3, 129, 384),  # two of two or one, and one of three shorter samples
        (5, 200, 400),  # three of two or one
        (1, 1024, 1024),  # no sample is cut
        (2, 100, 200),
    ],
)
def test_a_cpu_holds_one_pass_at_a_time(micro: int, length: int, tokens: int) -> None:
    wishes = {"micro_batch_size": micro, "gradient_checkpointing": False}
    plan = plan_training(find("smollm2-135m-instruct"), CPU, overrides=wishes, max_length=length, num_workers=1)
    one = hand_items("smollm2-135m-instruct", micro=1, length=tokens, checkpointing=False)
    assert {i.name: i.num_bytes for i in plan.memory.items} == pytest.approx(
        {k: v for k, v in one.items() if v}, abs=64
    )


def test_full_training_holds_all_logits_and_gradients_of_the_head() -> None:
    card, wishes = find("smollm2-135m-instruct"), {"micro_batch_size": 1, "gradient_checkpointing": False}
    items = [
        {
            item.name: item.num_bytes
            for item in plan_training(
                card, CPU, method="full", overrides=wishes, max_length=length, num_workers=workers
            ).memory.items
        }
        for length, workers in ((512, 1), (128, 1), (128, 2))
    ]
    assert items[0]["logits"] == 49152 * 4 * (3 * 512 + 2 * 576)
    assert items[1]["logits"] == 49152 * 4 * (3 * 128 + 2 * 576)
    assert "gradient buckets" not in items[1]
    assert items[2]["gradient buckets"] == 2 * 4 * 134_515_008
    # a layer: two norms' inputs, normed inputs and outputs, queries, attended and joined, nine of 576; keys and values,
    # two of 192; gate, its activation, up, product; a number per head and norm. Beside: the last hidden states three
    # times, and 16 bytes of work per value of the MLP.
    layer = 4 * (9 * 576 + 2 * 192 + 4 * 1536 + 9 + 2)
    assert items[0]["activations"] == 512 * (30 * layer + 3 * 4 * 576 + 16 * 1536)


def test_a_cpu_that_holds_one_copy_trains_with_one_worker() -> None:
    plan = plan_training(find("japanese-stablelm-3b-4e1t-instruct"), CPU)
    # fp32: 10.4 GiB; two of them are above 19.2
    assert (plan.precision, plan.num_workers) == ("fp32", 1)
    assert reason(plan, "num_workers") == ("memory", "each worker holds a copy of the model; two do not fit")


@pytest.mark.parametrize(
    ("name", "precision", "weights_gib"),
    [
        # the linears quantized, everything else in fp32
        ("qwen2.5-14b-instruct", "int8", 18.1),
        ("qwen2.5-32b-instruct", "nf4", 20.8),
        ("calm3-22b-chat", "nf4", 13.4),
        ("deepseek-r1-distill-qwen-32b-japanese", "int8", 34.9),
        ("llama-3.1-70b-instruct", "nf4", 40.7),
        ("phi-3.5-moe-instruct", "fp32", 156.0),
    ],
)
def test_what_does_not_fit_on_a_cpu_says_the_sum_and_what_fits(name: str, precision: str, weights_gib: float) -> None:
    assert FACTS[name].weights(precision, 4) / GIB == pytest.approx(weights_gib, abs=0.06)
    ram = declared(gpu=None, num_cpus=2, ram_bytes=22 * GIB)
    with pytest.raises(
        DoesNotFit, match=rf"at {precision} needs .*\(weights {weights_gib}, .* leaves 17\.6 GiB\. It fits "
    ):
        plan_training(find(name), ram)


def test_a_full_run_that_does_not_fit_offers_adapters_first() -> None:
    with pytest.raises(
        DoesNotFit, match=r"full training .*It fits with method 'lora', or with method 'qlora' at precis"
    ):
        plan_training(find("japanese-stablelm-3b-4e1t-instruct"), CPU, method="full")
