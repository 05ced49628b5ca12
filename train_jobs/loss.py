"""The loss of a pack of adapters, with the head computed only where there are labels.

N = tokens, M = labelled positions, h = hidden size, V = vocabulary, K = adapters in the pass.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from cluster.errors import UserError
from cluster.models.sample_attention import SampleAttention
from train_jobs.batches import MicroBatch
from train_jobs.embedding_noise import EmbeddingNoise
from train_jobs.head_loss import HeadLoss
from train_jobs.tokens import IGNORED


class UnsupportedModelError(UserError, ValueError):
    """A model whose logits are more than its head on its last hidden states."""


class PackLoss(nn.Module):
    """A causal language model that returns losses instead of logits.

    It calls the decoder and then the head on the labelled positions alone. Logits are often the largest tensor of a
    step, and two thirds of a chat sample have no label.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.attention = SampleAttention(model)
        self.noise = EmbeddingNoise(model)

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Return the summed cross entropy [K] of each block of `batch`; inside `attention.samples` of its lengths."""
        targets = batch.labels[:, 1:]
        labelled = targets != IGNORED  # [1, N - 1]
        hidden = self._decode(batch.input_ids, batch.position_ids)[:, :-1][labelled]  # [M, h]
        losses = self._cross_entropy(hidden, targets[labelled])  # [M]
        return losses.new_zeros(len(batch.counts)).index_add(0, batch.blocks[:, 1:][labelled], losses)

    def _cross_entropy(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        head = self.model.get_output_embeddings()
        # A head that learns needs its logits; one that ZeRO-3 has partitioned is whole only while it is called.
        if type(head) is nn.Linear and not head.weight.requires_grad and len(head.weight):
            losses: torch.Tensor = HeadLoss.apply(hidden, head.weight, head.bias, targets)  # type: ignore[no-untyped-call]
            return losses
        return nn.functional.cross_entropy(head(hidden).float(), targets, reduction="none")

    def _decode(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        output = self.model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden  # [1, N, h]

    @torch.no_grad()
    def check_head(self) -> None:
        """Compare decoder and head with the model itself, once it is prepared: until then, ZeRO-3 holds only shards.

        Raises:
            UnsupportedModelError: They do not give the model's own logits (scaled or capped logits).
        """
        was_training = self.model.training
        self.model.eval()
        probe = torch.arange(4, device=self.model.device)[None]  # [1, 4]
        expected = self.model(input_ids=probe, use_cache=False).logits
        ours = self.model.get_output_embeddings()(self._decode(probe))
        self.model.train(was_training)
        # The same products in other shapes: only rounding, in the base's own type, may differ.
        if (ours - expected).abs().max() > 0.01 * expected.abs().max():
            raise UnsupportedModelError(
                f"{type(self.model).__name__} changes its logits after the head; its loss is not supported yet."
            )
