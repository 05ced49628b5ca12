"""NEFTune's noise: as large as the paper says, each run's own, and only in training."""

from dataclasses import replace

import pytest
import torch
from test_pack import adapter, card, job_of, losses_of, pack_of

from cluster.model_card import ModelCard
from train_jobs.batches import collate
from train_jobs.embedding_noise import EmbeddingNoise
from train_jobs.evaluate import held_out_loss
from train_jobs.job import NO_ADAPTER
from train_jobs.step import train_step

__all__ = ["card"]


def test_each_sample_gets_uniform_noise_for_its_own_length(card: ModelCard) -> None:
    model = pack_of(job_of(card, adapter(1))).model
    embeddings = model.get_input_embeddings()
    ids = torch.arange(300)[None] % 258  # [1, N]
    plain = embeddings(ids)
    noise = EmbeddingNoise(model)
    with noise.samples([200, 90, 10], [5.0, 15.0, 0.0], [7, 8, 9]):
        first = embeddings(ids) - plain
        again = embeddings(ids) - plain
    assert torch.equal(first, again)
    assert torch.equal(embeddings(ids), plain)
    for part, alpha, length in ((first[0, :200], 5.0, 200), (first[0, 200:290], 15.0, 90)):
        bound = alpha / (length * 64) ** 0.5  # the paper's alpha / sqrt(L d), d = 64 in this model
        assert bound * 0.99 < part.abs().max() <= bound * (1 + 1e-4)
        # A uniform number in ±b has the deviation b / sqrt(3).
        assert part.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert not first[0, 290:].any()
    with noise.samples([10], [5.0], [8]):
        other = embeddings(ids[:, :10])
    assert not torch.equal(other[0] - plain[0, :10], first[0, :10])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_noise_changes_training_alone_and_not_with_the_cut_of_a_batch(card: ModelCard, method: str) -> None:
    quiet = adapter(1) if method == "lora" else replace(adapter(1), spec=NO_ADAPTER)
    noisy = replace(quiet, neftune_noise_alpha=15.0)
    losses = losses_of(job_of(card, noisy))
    assert losses[0][0] != pytest.approx(losses_of(job_of(card, quiet))[0][0], abs=1e-5)
    cut = losses_of(job_of(card, noisy, accumulation=4))
    assert [loss for (loss,) in cut] == pytest.approx([loss for (loss,) in losses], abs=1e-5)
    assert losses_of(job_of(card, noisy)) == losses
    pack, other = pack_of(job_of(card, noisy)), pack_of(job_of(card, quiet))
    assert held_out_loss(pack, slot=0) == held_out_loss(other, slot=0)


def test_a_noisy_run_beside_others_equals_itself_alone(card: ModelCard) -> None:
    runs = [replace(adapter(seed), neftune_noise_alpha=alpha) for seed, alpha in ((1, 5.0), (2, 0.0), (3, 15.0))]
    pack = pack_of(job_of(card, *runs))
    together = [train_step(pack, dict.fromkeys(range(3), step)).losses for step in range(4)]
    for slot, run in enumerate(runs):
        alone = losses_of(job_of(card, run))[:4]
        assert [losses[slot] for losses in together] == pytest.approx([loss for (loss,) in alone], abs=1e-5)


def test_a_batch_of_fillers_gets_noise_without_complaint(card: ModelCard) -> None:
    pack = pack_of(job_of(card, replace(adapter(1), neftune_noise_alpha=5.0)))
    batch = collate([[pack.job.samples[0], pack.job.samples[1]]], device=torch.device("cpu"))
    with pack.routed(batch, [0], dropout_keys=[0, 0]):
        assert pack.loss(batch).isfinite().all()
