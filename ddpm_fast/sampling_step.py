"""One step of a sampling run, network and reverse step, on tensors that are allocated once."""

__all__ = ["SamplingStep"]

import torch
from torch import Tensor

from . import ops
from .denoiser import Denoiser, ModelArguments, clip_bounds
from .nn.packed_weights import PackedWeights, packed
from .noise import NoiseSource
from .samplers import StepTable
from .threshold import DynamicThreshold


class SamplingStep:
    """The tensors of a run. It refers to no network: what is captured as a graph outlives the run, but not the network.

    Args:
        denoiser: in evaluation mode.
        x: a state, (N, ...), for shape, dtype and device.
        capacity: the most steps that a table may have.
        keyed: whether the noise is made from keys.
        noisy: whether there is noise at all, if it is made from keys.
        multistep: whether a step reads the x0_hat before.
        learned: whether a step's variance follows from the network.
        with_x_start: whether to keep x0_hat although neither sampler nor network needs it.
        dynamic_threshold: the quantile of |x0_hat| to which it is clipped, None for the bounds of the denoiser.
        model_kwargs: further arguments of the network, of the shapes that all runs have.

    Attributes:
        x: the state; x_start: the clipped x0_hat of the last step, None where nothing needs it.
        index: (1,), the step that a graph takes next.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        capacity: int,
        *,
        keyed: bool,
        noisy: bool,
        multistep: bool,
        learned: bool,
        with_x_start: bool,
        dynamic_threshold: float | None,
        model_kwargs: ModelArguments,
    ) -> None:
        # Channels-last, as the ops count noise; where another package's noise is drawn, its layout is kept too.
        layout = ops.channels_last_format(x.ndim) if keyed else None
        self.x = torch.empty_like(x, memory_format=layout or torch.preserve_format)
        needed = with_x_start or multistep or denoiser.self_condition
        self.x_start = torch.zeros_like(self.x) if needed else None
        dtype = denoiser.model_dtype(x)
        self._model_input = self.x if dtype == x.dtype else torch.empty_like(self.x, dtype=dtype)
        self._multistep, self._learned = multistep, learned
        self._clip = clip_bounds(denoiser.clip_denoised)
        self._threshold = None if dynamic_threshold is None else DynamicThreshold(dynamic_threshold, self._clip)
        self.index = torch.zeros(1, dtype=torch.int64, device=x.device)
        self._indices = torch.arange(capacity, device=x.device)
        self._timesteps = torch.zeros(capacity, dtype=torch.int64, device=x.device)
        self._rows = torch.zeros(capacity, 8 if learned else 6, dtype=x.dtype, device=x.device)
        self._keys = None
        if keyed and noisy:
            self._keys = torch.zeros(capacity, len(x), 2, dtype=torch.int64, device=x.device)
        self._noise = None if keyed else torch.zeros_like(self.x)
        # (capacity, D): all that the network makes of the timesteps, if it can tell before it sees an image
        self._time_rows: Tensor | None = None
        self._model_kwargs = {name: v.clone() if isinstance(v, Tensor) else v for name, v in model_kwargs.items()}
        self._weights = PackedWeights()

    def load(
        self,
        denoiser: Denoiser,
        x: Tensor,
        table: StepTable,
        source: NoiseSource,
        start_step: int,
        model_kwargs: ModelArguments,
    ) -> None:
        """Begins a run: copies everything that its steps read."""
        steps = len(table)
        self.put(x)
        if self.x_start is not None:
            self.x_start.zero_()
        self.index.fill_(start_step)
        self._rows[:steps] = table.rows.to(x)
        self._timesteps[:steps] = table.t.to(x.device)
        if self._keys is not None:
            self._keys[:steps] = source.keys(len(x), range(1, steps + 1))
        if hasattr(denoiser.model, "time_rows"):
            rows = denoiser.model.time_rows(self._timesteps[:steps])
            if self._time_rows is None:
                self._time_rows = rows.new_zeros(len(self._timesteps), *rows.shape[1:])
            self._time_rows[:steps] = rows
        for name, value in model_kwargs.items():
            if isinstance(value, Tensor):
                self._model_kwargs[name].copy_(value)

    def put(self, x: Tensor) -> None:
        """Writes the state that the next step begins with."""
        self.x.copy_(x)
        if self._model_input is not self.x:
            self._model_input.copy_(x)

    def take(self, denoiser: Denoiser, k: int, noise: Tensor | None, *, conditioned: bool) -> None:
        """Takes step k.

        Args:
            noise: z, where it is not made from keys.
            conditioned: whether the network is given x0_hat.
        """
        time_row = None if self._time_rows is None else self._time_rows[k]
        self._take(denoiser, self._indices[k], self._timesteps[k], time_row, noise, conditioned)

    def take_next(self, denoiser: Denoiser, *, conditioned: bool) -> None:
        """Takes the step `index`, which the host never reads, with the noise of `give_noise`, and counts on."""
        t = self._timesteps.index_select(0, self.index)
        time_row = None if self._time_rows is None else self._time_rows.index_select(0, self.index)[0]
        self._take(denoiser, self.index[0], t, time_row, self._noise, conditioned)
        self.index.add_(1)

    def give_noise(self, noise: Tensor) -> None:
        """The noise of the next `take_next`, where it is not made from keys."""
        self._noise.copy_(noise)

    def _take(
        self,
        denoiser: Denoiser,
        index: Tensor,
        t: Tensor,
        time_row: Tensor | None,
        noise: Tensor | None,
        conditioned: bool,
    ) -> None:
        x, model_input = self.x, self._model_input
        further = self._model_kwargs if time_row is None else self._model_kwargs | {"time_row": time_row}
        with packed(self._weights):
            pred, v = denoiser.predict(model_input, t.expand(len(x)), self.x_start if conditioned else None, further)
        # The op writes the next input of a network in half precision; a float64 network's is converted.
        written = model_input is not x and pred.dtype == model_input.dtype and model_input.itemsize < x.itemsize
        rows, keys, clip, scale = self._rows, self._keys, self._clip, None
        if self._threshold is not None:
            keys = None if keys is None else keys.index_select(0, index.view(1))[0]
            index, rows, clip, scale = self._threshold(x, pred, rows.index_select(0, index.view(1)))
        ops.reverse_step(
            x,
            pred,
            index,
            rows,
            noise=noise,
            keys=keys,
            x_start_prev=self.x_start if self._multistep else None,
            variance=v if self._learned else None,
            clip=clip,
            out=ops.ReverseStep(x, self.x_start, model_input if written else None),
        )
        if scale is not None and self.x_start is not None:
            self.x_start.mul_(scale)
        if model_input is not x and not written:
            model_input.copy_(x)
