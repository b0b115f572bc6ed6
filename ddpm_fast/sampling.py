"""A sampling run: the network and the step by turns, on tensors that are allocated once.

Nothing in a step asks the host or is sent to the device: timesteps, rows, keys and the time embeddings of all steps lie
there from the beginning.
"""

__all__ = ["SamplingRun"]

from collections.abc import Callable

import torch
from torch import Tensor

from . import cuda_graph, ops
from .nn.packed_weights import PackedWeights, packed
from .noise import Source
from .samplers import StepTable


class SamplingRun:
    """The state of a run, in [-1, 1], and how it is taken a step on.

    Attributes:
        x: the state, in float32 or float64; changed by every step.
        x_start: clip(x0_hat) of the last step, changed by every step; None where nobody needs it.

    Args:
        predict: the network, as predict(x, t, guess, time_row): x in `dtype`, t (N,), the last x_start or None, and a
            row of `time_rows` or None.
        x: the state to begin with, (N, ...), which is copied.
        table: the sampler's steps.
        source: of the noise.
        taken: steps of the table that lie behind x.
        dtype: what the network is given its input in.
        clip: bounds of x0_hat.
        with_x_start: x_start is wanted.
        self_condition: the network is given x_start.
        time_rows: what the network makes of each timestep of the table, (K, D), or None.
    """

    def __init__(
        self,
        predict: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor],
        x: Tensor,
        table: StepTable,
        source: Source,
        *,
        taken: int,
        dtype: torch.dtype,
        clip: tuple[float, float] | None,
        with_x_start: bool,
        self_condition: bool,
        time_rows: Tensor | None,
    ) -> None:
        self._predict, self._source, self._clip, self._time_rows = predict, source, clip, time_rows
        self._rows, self._timesteps = table.rows.to(x), table.t.to(x.device)
        self._indices = torch.arange(len(table), device=x.device)
        self._weights = PackedWeights()
        self._multistep, self._self_condition = bool((table.C != 0).any()), self_condition
        self._keys = None  # (K, N, 2)
        if source.keyed and bool((table.sigma[taken:] > 0).any()):
            self._keys = source.keys(len(x), range(1, len(table) + 1))

        # Channels-last, as the ops count noise; where another package's noise is drawn, its layout is kept too.
        layout = ops.channels_last_format(x.ndim) if source.keyed else None
        self.x = torch.empty_like(x, memory_format=layout or torch.preserve_format).copy_(x)
        self.x_start = torch.zeros_like(self.x) if with_x_start or self._multistep or self_condition else None
        self._model_input = self.x if dtype == x.dtype else self.x.to(dtype)

        self._first = taken
        self._replay = None
        if x.is_cuda and source.keyed and not self_condition and len(table) - taken > cuda_graph.WARM_UP:
            self._replay = self._capture()

    def step(self, k: int) -> None:
        """Takes step k of the table; the steps come in their order."""
        if self._replay is not None:
            self._replay()
            return
        noise = None
        # Other packages draw for every step but the last, whatever its sigma.
        if not self._source.keyed and k + 1 < len(self._rows):
            noise = self._source.draw(k + 1, self.x.shape)
        guess = self.x_start if self._self_condition and k > self._first else None
        row = None if self._time_rows is None else self._time_rows[k]
        self._take(self._indices[k], self._timesteps[k], row, noise, guess)

    def _take(
        self, index: Tensor, t: Tensor, row: Tensor | None, noise: Tensor | None = None, guess: Tensor | None = None
    ) -> None:
        x, model_input = self.x, self._model_input
        with packed(self._weights):
            pred = self._predict(model_input, t.expand(len(x)), guess, row)
        rounded = model_input is not x and pred.dtype == model_input.dtype
        ops.reverse_step(
            x,
            pred,
            index,
            self._rows,
            noise=noise,
            keys=self._keys,
            x_start_prev=self.x_start if self._multistep else None,
            clip=self._clip,
            out=ops.ReverseStep(x, self.x_start, model_input if rounded else None),
        )
        if model_input is not x and not rounded:
            model_input.copy_(x)

    def _capture(self) -> Callable[[], None]:
        index, t = (v[self._first : self._first + 1].clone() for v in (self._indices, self._timesteps))
        following = self._timesteps.roll(-1)

        def take() -> None:
            self._take(index[0], t, None if self._time_rows is None else self._time_rows.index_select(0, index)[0])
            torch.index_select(following, 0, index, out=t)
            index.add_(1)

        state = (self.x, self.x_start, self._model_input, index, t)
        return cuda_graph.captured(take, [y for y in state if y is not None])
