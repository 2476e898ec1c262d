"""One model of `ddl bench model`: built, checked against the reference, and ready to be timed."""

import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._inductor.utils import fresh_inductor_cache

from deep_delta.bench.check import Outcome, gradients_by_kind, model_difference
from deep_delta.model import DeepDeltaConfig, DeepDeltaForCausalLM
from deep_delta.model.capture import captured
from deep_delta.model.compile import compile_layers
from deep_delta.model.loss import resolve_loss
from deep_delta.model.presets import SIZES

BACKENDS = {"reference": "reference", "compile": "reference", "triton": "triton"}
BATCHES = 16  # different random batches, taken in turn


@dataclass(frozen=True)
class Setup:
    """What all models of one benchmark share; the fields are options of `ddl bench model`."""

    device: torch.device
    size: str
    batch: int
    seq_len: int
    state_dtype: str
    gradient_checkpointing: bool
    cuda_graphs: bool
    loss: str
    modes: tuple[str, ...]

    def __str__(self) -> str:
        checkpointing = " gradient-checkpointing" if self.gradient_checkpointing else ""
        graphs = " cuda-graphs" if self.cuda_graphs else ""
        return (
            f"size={self.size} batch={self.batch} seq_len={self.seq_len} "
            f"state={self.state_dtype} loss={self.loss}{checkpointing}{graphs}"
        )

    @functools.cached_property
    def pool(self) -> Any:
        """Memory of all CUDA graphs: one model's step is over before another one's begins."""
        return torch.cuda.graph_pool_handle()

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)


class Wrong(Exception):
    """A model whose loss, gradients or logits are not the reference's: it gets no figures."""


class Subject:
    """A model by its variant, what runs it, and its configuration's `rebuild`.

    `begin` builds it and must come first; `first_step` is then the seconds of its first training
    step, None if it does not train.
    """

    def __init__(self, variant: str, provider: str, rebuild: int | str, setup: Setup):
        self.variant, self.provider, self.rebuild, self.setup = variant, provider, rebuild, setup
        self.first_step: float | None = None
        self.turn = 0
        self.passes: dict[str, Callable[[Tensor], Tensor]]
        self.passes = {"train": self._forward_backward, "prefill": self._prefill}

    def __str__(self) -> str:
        rebuilt = f", rebuild {self.rebuild}" if self.rebuild != "speed" else ""
        return f"{self.variant} ({self.provider}{rebuilt})"

    @property
    def settings(self) -> str:
        """The setup, and what is rebuilt where that is a choice."""
        rebuilt = f" rebuild={self.rebuild}" if self.provider == "triton" else ""
        return f"{self.setup}{rebuilt}"

    def config(self) -> DeepDeltaConfig:
        """The model's configuration; ValueError for a combination that does not exist."""
        backend = BACKENDS[self.provider]
        return self._config(self.setup.state_dtype, backend=backend, rebuild=self.rebuild)

    def _config(self, state_dtype: str, **fields: Any) -> DeepDeltaConfig:
        size = self.setup.size
        longest = max(self.setup.seq_len, SIZES[size]["max_position_embeddings"])
        return DeepDeltaConfig.from_preset(
            self.variant,
            size,
            parameterization="published",
            state_dtype=state_dtype,
            max_position_embeddings=longest,
            **fields,
        )

    def _build(self, config: DeepDeltaConfig) -> DeepDeltaForCausalLM:
        torch.manual_seed(0)
        with self.setup.device:
            return DeepDeltaForCausalLM(config)

    def begin(self) -> None:
        """Build the model, check it in its first step, and time that step.

        Raises:
            Wrong: it differs from the reference.
            ValueError: a combination of options that does not exist.
        """
        setup = self.setup
        vocabulary = self.config().vocab_size
        torch.manual_seed(1)
        shape = (BATCHES, setup.batch, setup.seq_len)
        self.batches = torch.randint(vocabulary, shape, device=setup.device)
        # The mean loss of two sequences that fill a batch again and again is that of the two
        # alone, and so are the gradients: what is timed later is checked at its full shape, and
        # the reference needs little memory. An odd batch repeats a single one.
        pair = self.batches[0][: 2 - setup.batch % 2]
        rounded, exact = self._reference(pair)

        self.model = self._build(self.config())
        self.model.linear_cross_entropy = resolve_loss(setup.loss, setup.device)
        if setup.gradient_checkpointing:
            # Without dropout there is no state of a random generator to bring back.
            options = {"use_reentrant": False, "preserve_rng_state": False}
            self.model.gradient_checkpointing_enable(options)
        if self.provider != "reference":
            compile_layers(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, weight_decay=0.1, fused=True
        )
        with fresh_inductor_cache():  # a cold start finds nothing that an earlier run compiled
            self._first_step(pair, rounded, exact)

    def _first_step(self, pair: Tensor, rounded: Outcome, exact: Outcome) -> None:
        ids = pair.repeat(self.setup.batch // len(pair), 1)
        outcome = Outcome(rounded.loss, rounded.gradients)  # where nothing is trained
        forward_backward = optimizer_step = 0.0
        if "train" in self.setup.modes:
            start = self._now()
            loss = self._forward_backward(ids)
            forward_backward = self._now() - start
            outcome = Outcome(float(loss), gradients_by_kind(self.model))
        if "prefill" in self.setup.modes:
            outcome.logits = [self._prefill(ids)[: len(pair)]]
        wrong = model_difference(outcome, rounded, exact)
        if wrong is not None:
            raise Wrong(f"differs from the reference: {wrong}")
        if "train" in self.setup.modes:
            start = self._now()
            self._update()
            optimizer_step = self._now() - start
            self.model.zero_grad(set_to_none=True)
            self.first_step = forward_backward + optimizer_step

    def _reference(self, ids: Tensor) -> tuple[Outcome, Outcome]:
        """The plain model on a few sequences: as it is trained, and in fp32 throughout."""
        outcomes = []
        for dtype, autocast in (
            (self.setup.state_dtype, self.setup.autocast()),
            ("float32", contextlib.nullcontext()),
        ):
            model = self._build(self._config(dtype, backend="reference"))
            model.train()
            with autocast:
                loss = model(ids, labels=ids, skip_logits=True, use_cache=False).loss
                loss.backward()
                with torch.no_grad():
                    logits = model.eval()(ids, use_cache=False, logits_to_keep=1).logits
            wanted = [logits[:, -1]] if "prefill" in self.setup.modes else []
            outcomes.append(Outcome(float(loss.detach()), gradients_by_kind(model), wanted))
        return outcomes[0], outcomes[1]

    def _now(self) -> float:
        if self.setup.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def capture(self, mode: str) -> None:
        """Make the passes of "train" or "prefill" a CUDA graph where the setup asks for that.

        Raises:
            Wrong: replayed, it gives something else.
        """
        if not self.setup.cuda_graphs:
            return
        ids, launched = self.batches[0], self.passes[mode]
        expected = self._outcome(mode, launched(ids))
        if mode == "train":  # only the gradients that the graph itself makes lie where it writes
            self.model.zero_grad(set_to_none=True)
        self.passes[mode] = captured(launched, ids, pool=self.setup.pool)
        replayed = self._outcome(mode, self.passes[mode](ids))
        wrong = model_difference(replayed, expected, expected)
        if wrong is not None:
            raise Wrong(f"differs as a CUDA graph: {wrong}")

    def _outcome(self, mode: str, result: Tensor) -> Outcome:
        """On the host, so that it takes no memory of what is measured."""
        if mode == "prefill":
            return Outcome(0.0, {}, [result.cpu()])
        kinds = gradients_by_kind(self.model)
        return Outcome(float(result), {kind: [x.cpu() for x in kinds[kind]] for kind in kinds})

    def _forward_backward(self, ids: Tensor) -> Tensor:
        """The mean loss; its gradients are added to what there is."""
        self.model.train()
        with self.setup.autocast():
            loss = self.model(ids, labels=ids, skip_logits=True, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if not self.setup.cuda_graphs:  # a graph replaces the gradients where they lie
            self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _prefill(self, ids: Tensor) -> Tensor:
        """The logits of the last token of every sequence, (B, V), as a prompt needs them."""
        self.model.eval()
        with self.setup.autocast():
            return self.model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]

    def train(self, ids: Tensor) -> None:
        """One training step: forward, backward, clipping, AdamW."""
        self.passes["train"](ids)
        self._update()

    def prefill(self, ids: Tensor) -> None:
        """One forward pass over prompts."""
        self.passes["prefill"](ids)

    def work(self, mode: str) -> Callable[[], object]:
        """One step of "train" or "prefill" on the next batch, to be called."""
        self.turn += 1
        return functools.partial(getattr(self, mode), self.batches[self.turn % BATCHES])

    def release(self) -> None:
        """Let go of the model and everything else that takes memory, if it was ever built."""
        self.model = self.optimizer = self.batches = None  # type: ignore[assignment]
        self.passes.clear()


def graphs_apart() -> contextlib.AbstractContextManager:
    """Every model of a run has graphs of its own, though torch counts all layers as one function.

    No limit on their number, and no shapes that become symbols because two models differ in d_v.
    """
    return torch._dynamo.config.patch(
        recompile_limit=4096, accumulated_recompile_limit=4096, automatic_dynamic_shapes=False
    )
