"""Measure the memory of a step's passes, without weights and stored gradients, by running them on fake tensors.

The code of a real step runs, the decoding loop, the pass that computes log-probs and the model's own, so neither a
family nor a change to a pass needs a formula here. The bytes of the tensors that are alive are counted meanwhile.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from remax_lightning.errors import UserError
from remax_lightning.functional import OutputHead, TokenStatistics
from remax_lightning.models.forward import SOFT_CAPS, accepts_argument, prompt_index_per_row
from remax_lightning.models.log_probs import ForwardBatch, row_statistics
from remax_lightning.models.packing import attention_obstacle
from remax_lightning.models.sampling import NO_TOKENS, SuppressedTokens, next_tokens
from remax_lightning.rollout import GenerationRequest, SamplingConfig
from remax_lightning.rollout.decode_attention import RolloutSize, RolloutStates
from remax_lightning.rollout.decode_loop import DecodeLoop
from remax_lightning.rollout.engines import kind_of_states
from remax_lightning.rollout.shared_prefix import SharedPrefix
from remax_lightning.rollout.static_cache import allocate_slots, bucketed_length
from remax_lightning.sharding import language_model, unwrap_peft
from remax_lightning.tools.plan.types import BackwardPeak, RolloutBytes, TrainingBytes, UpdateBytes
from remax_lightning.training.optimization import choose_update_kernel

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


_DEVICE = torch.ops.prim.device.default


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live tensors that operators created inside this context.

    What `torch.cuda.max_memory_allocated` tells of a CUDA device, this tells of any device, and of fake tensors that
    have a shape and no memory. Scratch space that a kernel takes and returns is not seen.

    Args:
        known: tensors and modules from before; they and their views are not counted.

    Attributes:
        live: bytes now.
        peak: the most since the start or the last `reset`.
    """

    def __init__(self, known: Iterable[Tensor | nn.Module] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: int = 0
        self.peak: int = 0
        self._sizes: dict[int, int] = {}  # bytes by storage
        for item in known:
            for tensor in (*item.parameters(), *item.buffers()) if isinstance(item, nn.Module) else (item,):
                self._watch(tensor, 0)

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Every operator passes here, those of the backward pass, too. Half of the calls ask where a tensor is.
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._watch(tensor)
        return output

    def reset(self) -> None:
        """Set the peak to the bytes of now."""
        self.peak = self.live

    def _watch(self, tensor: Tensor, size: int | None = None) -> None:
        # A storage keeps its Python object as long as it lives, so the object's end is the memory's.
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes() if size is None else size
        self.live += self._sizes[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


@contextmanager
def shapes_only(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Make tensors inside that have shape, dtype and a place in the autograd graph, and neither memory nor values.

    Every operator runs as it would on a CPU, down to the choice of the attention kernel, but computes nothing.

    Args:
        dtype: what models are built in.
    """
    # ---- The dtype of models, and no messages about missing values ----
    before, log = torch.get_default_dtype(), logging.getLogger("torch._subclasses.fake_tensor")
    torch.set_default_dtype(dtype)
    log.disabled, quiet = True, log.disabled  # of what an operator cannot do without values the exception says enough
    try:
        with FakeTensorMode():
            yield
    finally:
        log.disabled = quiet
        torch.set_default_dtype(before)


class StepShape(NamedTuple):
    """The work of one device in a step.

    Args:
        prompts: `B`, prompts of a rollout.
        sampling: with `n` samples per prompt and `R` tokens per response.
        prompt_length: tokens of a prompt, `P`; all prompts count as the longest.
        training_rows: responses per training pass.
        scoring_rows: responses per pass of the policy without gradients.
        reference_rows: responses per pass of the reference.
        reward_rows: texts per pass of the reward model.
        reward_length: most tokens of a text; None for those of prompt and response.
        suppressed: tokens that are never sampled and have no log-prob; their masks need memory.
    """

    prompts: int
    sampling: SamplingConfig
    prompt_length: int
    training_rows: int
    scoring_rows: int
    reference_rows: int
    reward_rows: int = 0
    reward_length: int | None = None
    suppressed: SuppressedTokens = NO_TOKENS

    @property
    def length(self) -> int:
        """Tokens of a prompt with its response, `T`."""
        return self.prompt_length + self.sampling.max_response_length


class StepPasses:
    """Runs each pass of a step separately, over models that were made inside `shapes_only`.

    Args:
        policy: the model that is trained, with gradient checkpointing as it will be.
        work: what it does.
        autocast: makes the context that a step runs in.
        whole_logits: the output embedding is not accessible by itself, so the policy's passes compute all logits.
        device: `cpu`, whose rollouts share prompts, or `gpu`, whose rows have all that they attend to.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        work: StepShape,
        autocast: Callable[[], AbstractContextManager[Any]],
        *,
        whole_logits: bool,
        device: str = "cpu",
    ) -> None:
        self.policy, self.work, self.autocast, self.whole_logits = policy, work, autocast, whole_logits
        self.device = device

    @torch.no_grad()
    def rollout(self, *, greedy: bool) -> RolloutBytes:
        """Measure a rollout by `PairedEngine`: the prefill of the prompts, then the longest decoding step.

        Raises:
            UserError: if the policy needs another engine.
        """
        # ---- A model whose cache `PairedEngine` can keep ----
        model, sampling = language_model(self.policy).eval(), self.work.sampling
        if getattr(model, "_is_stateful", False) or not accepts_argument(model, "past_key_values"):
            raise _unsupported_engine_error(model)
        # ---- The request of a rollout ----
        ids, mask = _dummy_rows(self.work.prompts, self.work.prompt_length)  # [B, P]
        rows = prompt_index_per_row(ids, sampling.num_samples, greedy)  # [N]
        suppressed = self.work.suppressed
        eos_ids = list(suppressed.eos_ids) if sampling.min_response_length else []
        request = GenerationRequest(
            ids, mask, sampling, eos_ids, 0, torch.Generator(), greedy, unused_ids=suppressed.unused_ids
        )
        # ---- The prompts, the first token, the longest step ----
        with self.autocast(), LiveBytes([model]) as live:
            # No CUDA graphs, which take no tensors without memory, and no cast weights, which the plan lists apart.
            try:
                loop = DecodeLoop(model, request, rows, None, partial(self._states, model))
            except UserError as error:
                raise _unsupported_engine_error(model) from error
            loop.suppress_tokens(0)
            tokens = next_tokens(loop.logits, request.num_sampled, sampling, request.generator)  # [N]
            peak = live.peak
            # The last step attends to the most slots; a response of one token needs none.
            graphs = 0
            if sampling.max_response_length > 1:
                before = live.live
                live.reset()
                loop.decode_step(sampling.max_response_length - 2, tokens)
                graphs = _graph_bytes(self.work, live.peak - before, loop.logits.nbytes)
                loop.suppress_tokens(sampling.max_response_length - 1)
                next_tokens(loop.logits, request.num_sampled, sampling, request.generator)
        # ---- Keys and values, and everything else ----
        states = sum(tensor.nbytes for tensor in loop.buffers.states)
        return RolloutBytes(states, max(peak, live.peak) - states, graphs)

    def _states(self, model: PreTrainedModel, cache: DynamicCache, size: RolloutSize) -> RolloutStates:
        """Return keys and values as a rollout of the device has them."""
        kind, _ = kind_of_states(cache)
        if self.device == "cpu" and kind is SharedPrefix and not attention_obstacle(model):
            states = SharedPrefix(cache, size)
            for suffix in states.suffix:  # the longest step comes first here, before any token is written
                suffix.zero_()
            return states
        return allocate_slots(cache, size)

    @torch.no_grad()
    def policy_scoring(self) -> int:
        """Measure a pass of the policy without gradients."""
        with LiveBytes([self.policy]) as live, self.autocast():
            self._run(self.policy.train(), self._head(self.policy), self.work.scoring_rows)
        return live.peak

    @torch.no_grad()
    def reference_scoring(self, reference: PreTrainedModel) -> int:
        """Measure a pass of the reference, which may be the policy itself."""
        with LiveBytes([reference]) as live, self.autocast():
            self._run(reference.eval(), self._head(reference), self.work.reference_rows, truncate=False)
        return live.peak

    @torch.no_grad()
    def reward_scoring(self, reward: PreTrainedModel, limit: int | None = None) -> int:
        """Measure a pass of a reward model, which reads `limit` tokens at most."""
        reward.eval().config.use_cache = False
        length = self.work.reward_length or self.work.length
        ids, mask = _dummy_rows(self.work.reward_rows, length if limit is None else min(limit, length))
        with LiveBytes([reward]) as live, self.autocast():
            reward.base_model(ids, attention_mask=mask.long())
        return live.peak

    def hidden_state_bytes(self, reference: PreTrainedModel, rows: int) -> int:
        """Return the bytes of the reference's hidden states of `rows` responses, for a KL over the vocabulary."""
        weight = self._required_head(reference).weight  # [V, D']
        return rows * self.work.sampling.max_response_length * weight.shape[1] * weight.itemsize

    def training(self, reference: PreTrainedModel | None = None) -> TrainingBytes:
        """Measure forward and backward pass; give `reference` for a KL over the vocabulary."""
        moments: list[BackwardPeak] = []
        stored = 0

        def store(parameter: Tensor) -> None:
            nonlocal stored
            # A gradient that is complete leaves the count: what is kept of it depends on the strategy (`phases.py`).
            parameter.grad = None
            moments.append(BackwardPeak(live.peak, stored))
            stored += parameter.numel()
            live.reset()

        # ---- A hook on each parameter that is trained: one moment per gradient ----
        policy = self.policy.train()
        hooks = [
            weight.register_post_accumulate_grad_hook(store) for weight in policy.parameters() if weight.requires_grad
        ]
        with LiveBytes([policy] if reference is None else [policy, reference]) as live:
            with self.autocast(), _live_after_body(policy, self._head(policy), live) as body:
                # ---- Forward ----
                statistics = self._run(policy, self._head(policy), self.work.training_rows, reference)
                loss = statistics.log_probs if statistics.kl is None else statistics.log_probs + statistics.kl  # [K]
            # ---- Backward; only the loss keeps the graph ----
            del statistics
            forward = live.peak
            live.reset()
            loss.sum().backward()
            moments.append(BackwardPeak(live.peak, stored))
        for hook in hooks:
            hook.remove()
        return TrainingBytes(body[0], forward, tuple(moments))

    def _run(
        self,
        model: PreTrainedModel,
        head: OutputHead | None,
        num_rows: int,
        reference: PreTrainedModel | None = None,
        *,
        truncate: bool = True,
    ) -> TokenStatistics:
        """Run the pass of a step over `num_rows` responses of full length, without padding."""
        # ---- Rows of full length ----
        length = self.work.sampling.max_response_length
        ids, mask = _dummy_rows(num_rows, self.work.length)  # [M, T]
        row, positions = torch.arange(num_rows).repeat_interleave(length), torch.arange(length).repeat(num_rows)  # [K]
        predicting = row * self.work.length + self.work.prompt_length - 1 + positions
        targets = torch.zeros_like(positions)
        rows = ForwardBatch(ids, mask, length, predicting, targets, positions, row * length + positions)
        # ---- Hidden states of the reference, for a KL over the vocabulary ----
        compared = None
        if reference is not None:
            other = self._required_head(reference)
            compared = torch.empty(len(positions), other.weight.shape[1], dtype=other.weight.dtype), other  # [K, D']
        return row_statistics(
            model,
            rows,
            head,
            self.work.sampling,
            self.work.suppressed,
            compared,
            truncate=truncate,
        ).statistics

    def _head(self, model: PreTrainedModel) -> OutputHead | None:
        """Return the output head of a model; None if its pass computes all logits at once."""
        return None if self.whole_logits and model is self.policy else output_head(model)

    def _required_head(self, reference: PreTrainedModel) -> OutputHead:
        head = output_head(reference)
        if head is None or self._head(self.policy) is None:
            raise UserError(
                "model.kl.estimator (or loss_estimator) full needs output heads that can be read: not under a strategy"
                " that spreads the policy over the devices, and only linear ones; choose k1, k2 or k3"
            )
        return head


def _graph_bytes(work: StepShape, step: int, logits: int) -> int:
    """Return the bytes of the pool of CUDA graphs.

    Graphs share their temporary memory, but each keeps its logits; graphs of half of the rows, of a quarter and so on
    together keep as many again.

    Args:
        work: whose responses the graphs decode, one graph for each bucket of lengths.
        step: peak bytes of a decoding step.
        logits: bytes of the logits of all rows.
    """
    lengths = range(work.prompt_length + 1, work.length)
    return step + 2 * len({bucketed_length(length) for length in lengths}) * logits


@contextmanager
def _live_after_body(model: PreTrainedModel, head: OutputHead | None, live: LiveBytes) -> Iterator[list[int]]:
    """Record the live bytes at the end of the model's body, before any logits, in the list that it yields."""
    moments: list[int] = []

    def note(_: nn.Module, __: Any, output: Any) -> None:
        moments.append(live.live - (output.logits.nbytes if head is None else 0))

    # Without a head the model itself runs to its logits; a PEFT wrapper calls it without its hooks.
    module = cast(nn.Module, model if head is None else unwrap_peft(model).base_model)
    hook = module.register_forward_hook(note)
    try:
        yield moments
    finally:
        hook.remove()


def update_bytes(
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    groups: Sequence[dict[str, Any]],
    device: torch.device,
) -> UpdateBytes:
    """Measure the state and the temporary memory of an optimizer; call it inside `shapes_only`.

    Args:
        make: makes the optimizer of parameter groups.
        groups: the parameter groups.
        device: where the run trains: on CUDA a run chooses the fused kernel, and torch updates all parameters at once.
    """
    # ---- Parameters with gradients, and the optimizer ----
    parameters = [parameter for group in groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer = make([dict(group) for group in groups])
    choose_update_kernel(optimizer, device)
    for group in optimizer.param_groups:
        if device.type == "cuda" and not group.get("fused") and group.get("foreach", False) is None:
            group["foreach"] = True
    with LiveBytes([*parameters, *(parameter.grad for parameter in parameters)]) as live:
        # The first step makes the state, the second shows what an update needs beside it.
        optimizer.step()
        state = live.live
        live.reset()
        optimizer.step()
    for parameter in parameters:
        parameter.grad = None
    return UpdateBytes(state, live.peak - state)


def output_head(model: PreTrainedModel) -> OutputHead | None:
    """Return the output head like `find_head`, which needs real weights; None if it is not a linear layer."""
    layer = language_model(model).get_output_embeddings()
    if type(layer) is not nn.Linear:
        return None
    config = cast(Any, model).config.get_text_config()
    caps = [getattr(config, name, None) for name in SOFT_CAPS]
    return OutputHead(layer.weight, layer.bias, soft_cap=next((cap for cap in caps if cap), None))


def _unsupported_engine_error(model: PreTrainedModel) -> UserError:
    return UserError(
        f"model.policy.path: remax plan knows the memory of PairedEngine only, which cannot decode with a"
        f" {type(model).__name__}: it keeps more than keys and values"
    )


def _dummy_rows(count: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(count, length, dtype=torch.long), torch.ones(count, length, dtype=torch.bool)
