r"""The loss of a batch whose rows are spread over the ranks of a process group: every collective there is.

A rank owns its rows of X_hat, which never travel, and sees every column of Y_hat: either all of them gathered at once
("gather"), or one rank's after another as they go around ("ring"), its own first, so that row i's positive is column i.
On what it sees it does what one process does, with the same operators; what it finds out about a column of another rank
goes back to its owner:

    col_lse     merged by logaddexp
    grad_y      summed, in the accumulation dtype
    smoothing   without ids the sums over a side are two vectors that all ranks add up; with ids the sum over a row's
                group is taken from the columns as they come, and that over a column's from the rows of each rank

    per rank    matmuls            sent, in elements of the operands' dtype and (grad_y) the accumulation dtype
    gather      4 of (B/W) x N     forward N D (W-1)/W; backward N D (W-1)/W of grad_y
    ring        4 of (B/W) x N     forward the same; backward the same of Y_hat again and of grad_y

beside vectors of length N. With J_r what rank r makes of its outputs, each rank's features get the derivative of
sum_r J_r, as autograd has it of a sum over ranks; numbers that all ranks share get 1/W of it, the same everywhere. So
the mean over ranks that DDP and FSDP take of parameters' gradients is the derivative of mean_r J_r, of the loss itself
where every rank returns it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from modest_align_kernels import ops
from modest_align_kernels.autograd import OnlyFirstDerivatives, Options, number_groups, through_normalisation
from modest_align_kernels.backends import WORKSPACE_BYTES, accumulation_dtype, blocks, negated_sums
from modest_align_kernels.backends.registry import operand_width
from modest_align_kernels.noise import IMAGES, TEXTS

# Gathered columns and their gradient may take so much; past it "auto" is the ring.
GATHER_BYTES = 16 * WORKSPACE_BYTES
_ROWS = 1024  # of a block of O(N D) terms
_Result = TypeVar("_Result")

# PyTorch 2.13 has new names for them, and warns at the old ones.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@torch.compiler.disable
def outside_graphs(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, where a graph breaks: how many rows other ranks have is not known while it is traced."""
    return function(*args)


def group_of(process_group: Any) -> ProcessGroup:
    """The ProcessGroup of what ``process_group=`` takes, or one sentence."""
    want = "a ProcessGroup, a DeviceMesh of one dimension or (DeviceMesh, dimension)"
    mesh, dimension = process_group if isinstance(process_group, tuple) and len(process_group) == 2 else (None, None)
    if isinstance(process_group, DeviceMesh):
        if process_group.ndim != 1:
            raise ValueError(
                f"process_group: got a DeviceMesh of {process_group.ndim} dimensions, want (DeviceMesh, dimension): "
                "that of the ranks that have different pairs"
            )
        mesh, dimension = process_group, 0
    if isinstance(mesh, DeviceMesh):
        try:
            process_group = mesh.get_group(dimension)
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            raise ValueError(f"process_group: got dimension {dimension!r} of {mesh}, want one of its own") from error
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group: got one that this rank is no member of, want one that it is in")
    if not isinstance(process_group, ProcessGroup):
        raise TypeError(f"process_group: got {type(process_group).__name__}, want {want}")
    return process_group


def agree(
    group: ProcessGroup, device: torch.device, check: Callable[[], tuple[_Result, tuple[int, int], dict[str, Any]]]
) -> tuple[_Result, list[list[int]]]:
    """What ``check`` returns, and the extents of every rank; or the same exception on every rank.

    One all-gather of four integers, which the host waits for: it needs the extents. A GPU is not waited for where the
    group has a backend for the CPU's tensors, as ``init_process_group()`` makes it.

    Args:
        group: the ranks.
        device: of the features.
        check: looks at this rank's arguments; returns a result, two extents, and what all ranks must have alike.
    """
    error: Exception | None = None
    extents, alike = (0, 0), dict[str, Any]()
    try:
        result, extents, alike = check()
    except Exception as raised:  # whatever it is, the others wait
        error = raised
    digest = hashlib.blake2b(repr(alike).encode(), digest_size=7).digest()
    message = torch.tensor([error is not None, *extents, int.from_bytes(digest, "big")])
    if "cpu:" not in dist.get_backend_config(group):
        message = message.to(device)
    everyone = message.new_empty((group.size(), len(message)))
    _all_gather(everyone.view(-1), message, group=group)
    table = everyone.tolist()
    if any(row[0] or row[-1] != table[0][-1] for row in table):
        _raise_everywhere(group, error, alike)
    return result, [row[1:-1] for row in table]


def _raise_everywhere(group: ProcessGroup, error: Exception | None, alike: dict[str, Any]) -> None:
    """Raise the first rank's exception, or say what is not alike."""
    everyone: list[Any] = [None] * group.size()
    kind = next((kind for kind in (TypeError, ValueError) if isinstance(error, kind)), RuntimeError)
    dist.all_gather_object(everyone, (error and (kind, str(error)), alike), group=group)
    for rank, (raised, _) in enumerate(everyone):
        if raised is not None:
            raise raised[0](f"{raised[1]} (on rank {rank} of {group.size()})") from error
    for name, first in everyone[0][1].items():
        for rank, (_, theirs) in enumerate(everyone):
            if theirs[name] != first:
                raise ValueError(
                    f"{name}: got {first} on rank 0 and {theirs[name]} on rank {rank} of {group.size()}, "
                    "want the same on every rank"
                )


class Columns(NamedTuple):
    """Columns that are seen at once: all of them, or one rank's.

    Attributes:
        y_hat: [n, width].
        ids: int64 of the first columns, those that may be in a group; None: there are no groups.
        vectors: [counted, K], what the backward must know of each; None in the forward.
        counted: the first columns, that have a logsumexp of their own.
        own_first: the first ones are this rank's.
    """

    y_hat: Tensor
    ids: Tensor | None
    vectors: Tensor | None
    counted: int
    own_first: bool


@dataclass(frozen=True)
class Ranks:
    """How the columns are spread over a group.

    Attributes:
        group: the ranks.
        counted: of each rank, the columns that have a logsumexp of their own.
        extra: of each rank, those that follow them and have none.
        extra_ids: the extra columns have ids, too, where there are groups.
        ring: else gather.
    """

    group: ProcessGroup
    counted: list[int]
    extra: list[int]
    extra_ids: bool
    ring: bool

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        return self.group.rank()

    @property
    def size(self) -> int:
        """W."""
        return self.group.size()

    @property
    def columns(self) -> int:
        """N."""
        return sum(self.counted) + sum(self.extra)

    def total(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """``tensor``, by now the sum over all ranks."""
        dist.all_reduce(tensor, op, self.group)
        return tensor

    def local(self, y_hat: Tensor, ids: Tensor | None, vectors: Tensor | None = None) -> Columns:
        """This rank's columns."""
        return Columns(y_hat, ids, vectors, self.counted[self.rank], True)

    def gathered(self, own: Columns) -> Columns:
        """All ranks' columns: this rank's counted ones, the others', then the extra ones in the same order."""
        ids = None if own.ids is None else self._gather(own.ids, self.extra_ids)
        return Columns(self._gather(own.y_hat, True), ids, None, sum(self.counted), True)

    def gather_counted(self, local: Tensor) -> Tensor:
        """All ranks' rows of a tensor that has one for each counted column, in the order of the columns."""
        return self._gather(local, False)

    def visit(
        self,
        columns: Columns,
        find: Callable[[Columns], Tensor],
        merge: Callable[[Tensor, Tensor], Tensor],
        home: Callable[[Tensor], Tensor],
        extra: bool,
    ) -> Tensor:
        """What all ranks find out about this rank's columns.

        Args:
            columns: this rank's for the ring, else all.
            find: for columns, a tensor with a row for each.
            merge: of two ranks' findings about the same columns; may write into either.
            home: the merged findings of all ranks about this rank's columns, from this rank's about all.
            extra: the findings are about extra columns, too.
        """
        return self._around(columns, find, merge, extra) if self.ring else home(find(columns))

    def exchange(self, found: Tensor) -> Tensor:
        """Of what each rank found about all counted columns [C, K], all about this rank's: [W, counted, K]."""
        own = self.counted[self.rank]
        received = found.new_empty((self.size * own, *found.shape[1:]))
        sent = torch.cat(self._by_rank(found, self.counted))
        dist.all_to_all_single(received, sent, [own] * self.size, self.counted, group=self.group)
        return received.view(self.size, own, *found.shape[1:])

    def sum_to_owners(self, whole: Tensor) -> Tensor:
        """Of what each rank has for all columns [N, width], the sum for this rank's; ``whole`` is written over."""
        parts = self._parts(True)
        if whole.numel() == 0:  # not wanted
            return whole[: sum(lengths[self.rank] for lengths in parts)]
        sums = [self._sum_to_owners(t, p) for t, p in zip(whole.split([sum(p) for p in parts]), parts, strict=True)]
        return sums[0] if len(sums) == 1 else torch.cat(sums)

    def _parts(self, extra: bool) -> list[list[int]]:
        """Of what begins with the counted columns of every rank: those, and the extra ones, if any rank has some."""
        return [self.counted, self.extra] if extra and any(self.extra) else [self.counted]

    def _by_rank(self, whole: Tensor, lengths: list[int]) -> list[Tensor]:
        """Each rank's rows of a tensor that begins with this rank's, in whose place rank 0's are."""
        order = list(range(self.size))
        order[0], order[self.rank] = self.rank, 0  # its own inverse
        in_place = whole.split([lengths[q] for q in order])
        return [in_place[order[q]] for q in range(self.size)]

    def _gather(self, local: Tensor, extra: bool) -> Tensor:
        parts = self._parts(extra)
        whole = local.new_empty((sum(map(sum, parts)), *local.shape[1:]))
        own_parts = local.contiguous().split([lengths[self.rank] for lengths in parts])
        for to, own, lengths in zip(whole.split([sum(p) for p in parts]), own_parts, parts, strict=True):
            by_rank = self._by_rank(to, lengths)
            if len(set(lengths)) == 1:
                # By rank; then two blocks change places.
                _all_gather(to, own, group=self.group)
                by_rank[0].copy_(to[: len(own)])
                by_rank[self.rank].copy_(own)
                continue
            by_rank[self.rank].copy_(own)
            present = [(q, t) for q, t in enumerate(by_rank) if len(t)]
            _wait([dist.broadcast(t, group=self.group, group_src=q, async_op=True) for q, t in present])
        return whole

    def _sum_to_owners(self, whole: Tensor, lengths: list[int]) -> Tensor:
        by_rank = self._by_rank(whole, lengths)
        own = by_rank[self.rank]
        if len(set(lengths)) == 1:
            if self.rank:
                first = by_rank[0].clone()
                by_rank[0].copy_(own)
                own.copy_(first)
            own = torch.empty_like(own)
            _reduce_scatter(own, whole, group=self.group)
            return own
        present = [(q, t) for q, t in enumerate(by_rank) if len(t)]
        _wait([dist.reduce(t, group=self.group, group_dst=q, async_op=True) for q, t in present])
        return own

    def _around(
        self,
        columns: Columns,
        find: Callable[[Columns], Tensor],
        merge: Callable[[Tensor, Tensor], Tensor],
        extra: bool,
    ) -> Tensor:
        returning = None
        for step in range(self.size):
            # Whose columns come next; after the last step, what the others found out about this rank's own.
            next_owner = (self.rank - step - 1) % self.size
            counted, total = self.counted[next_owner], self.counted[next_owner] + self.extra[next_owner]
            coming = None
            if step + 1 < self.size:
                # Sent on before they are looked at: the one takes place during the other.
                lengths = total, total if self.extra_ids else counted, counted
                coming = self._pass_on((columns.y_hat, columns.ids, columns.vectors), lengths, 0)
            found = find(columns)
            if step == 0:
                at_home = found  # the others' come after the last step
            else:
                found = found if returning is None else merge(returning()[0], found)
                returning = self._pass_on((found,), (total if extra else counted,), 3)
            if coming is not None:
                y_hat, ids, vectors = coming()
                columns = Columns(y_hat, ids, vectors, counted, False)
        return at_home if returning is None else merge(at_home, returning()[0])

    def _pass_on(
        self, tensors: Sequence[Tensor | None], lengths: Sequence[int], first_tag: int
    ) -> Callable[[], list[Any]]:
        """Start to send tensors to the next rank, and to receive such of other lengths from the last.

        Returns:
            Called once, waits for both, and returns what came.
        """
        # Numbers in the group, P2POp's last argument: its third would be a global rank.
        following, previous = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        received, transfers = [], []
        for tag, (tensor, length) in enumerate(zip(tensors, lengths, strict=True), first_tag):
            coming = None if tensor is None else tensor.new_empty((length, *tensor.shape[1:]))
            received.append(coming)
            # Both ends leave out what is empty.
            if tensor is not None and tensor.numel():
                transfers.append(dist.P2POp(dist.isend, tensor.contiguous(), None, self.group, tag, following))
            if coming is not None and coming.numel():
                transfers.append(dist.P2POp(dist.irecv, coming, None, self.group, tag, previous))
        works = dist.batch_isend_irecv(transfers) if transfers else []

        def wait() -> list[Any]:
            _wait(works)
            transfers.clear()  # which kept what was sent
            return received

        return wait


def _wait(works: Sequence[Any]) -> None:
    for work in works:
        work.wait()


class _Rows(NamedTuple):
    """This rank's rows, as every block of columns meets them."""

    x_hat: Tensor
    scale: Tensor
    ids: Tensor | None  # int64 [B]
    numbers: Tensor | None  # int32 [B], of their groups
    exclude_own: bool  # row i's positive, column i of this rank's, is excluded
    options: Options

    def numbers_of(self, columns: Columns) -> Tensor | None:
        """int32 [n], those of the columns' groups: B if they are in no group of these rows."""
        if self.ids is None or columns.ids is None:
            return None
        _, numbers = number_groups(self.ids, columns.ids, len(columns.ids))
        return torch.nn.functional.pad(numbers, (0, len(columns.y_hat) - len(numbers)), value=len(self.ids))

    def excluded(self, columns: Columns, numbers: Tensor | None) -> tuple[Any, ...]:
        """Arguments row_ids, col_ids and exclude_diagonal of the operators."""
        return self.numbers, numbers, self.exclude_own and columns.own_first


def _rows(x_hat: Tensor, scale: Tensor, ids: Tensor | None, exclude_own: bool, options: Options) -> _Rows:
    numbers = None if ids is None else number_groups(ids, None, len(ids))[0]
    return _Rows(x_hat, scale, ids, numbers, exclude_own, options)


def _row_dots(hat: Tensor, sums: Tensor, numbers: Tensor | None) -> Tensor:
    """<hat_i, the sums of i's number> [rows]."""
    dots = sums.new_empty(len(hat))
    for i in blocks(len(hat), _ROWS):
        own = sums if numbers is None else sums[numbers[i]]
        torch.sum(hat[i].to(sums.dtype) * own, dim=1, out=dots[i])
    return dots


def _add_smoothing(
    grad: Tensor, smoothing: Tensor, weight: Tensor, sums: tuple[Tensor, ...], numbers: Tensor | None
) -> None:
    """Add smoothing * (weight_i * own_i + other_i), as ``backends/eager.py`` writes it.

    Args:
        grad: [rows, width].
        smoothing: 0-dim.
        weight: of the first rows; the others' are 0.
        sums: own and other, by the number of a row's group; of one number without groups.
        numbers: int32 [rows], or None.
    """
    weight = torch.nn.functional.pad(weight * smoothing, (0, len(grad) - len(weight)))
    for i in blocks(len(grad), _ROWS):
        own, other = (t if numbers is None else t[numbers[i]] for t in sums)
        grad[i].addcmul_(weight[i, None], own).addcmul_(smoothing, other)


class _Stats(NamedTuple):
    """What a rank knows of its rows and of its counted columns when all have met."""

    row_lse: Tensor
    col_lse: Tensor  # [0] in one direction
    exponentials: Tensor | None
    y_sums: Tensor | None  # by a row's number: sums over the columns; with groups and x_sums
    row_counts: Tensor  # columns in the row's group
    col_dots: Tensor  # y_hat_j with the sum over the rows; likewise, and in both directions, else [0]
    col_counts: Tensor  # rows in the column's group


def _stats(ranks: Ranks, columns: Columns, rows: _Rows, x_sums: Tensor | None) -> _Stats:
    """The logsumexps of this rank's rows and columns, and what the smoothing wants to know of groups.

    Args:
        ranks: where the columns are.
        columns: this rank's for the ring, else all.
        rows: this rank's.
        x_sums: by number, the sums over this rank's rows; None: nobody asks for sums over groups.
    """
    pairs, options = len(rows.x_hat), rows.options
    row_lse = rows.scale.new_full((pairs,), -math.inf)
    row_counts = rows.scale.new_zeros(pairs)
    y_sums = None if x_sums is None else torch.zeros_like(x_sums)
    exponentials: Tensor | None = None

    def sizes(numbers: Tensor) -> Tensor:
        return row_lse.new_zeros(pairs + 1).index_add_(0, numbers, row_lse.new_ones(len(numbers)))

    group_sizes = None if x_sums is None or rows.numbers is None else sizes(rows.numbers)

    def find(columns: Columns) -> Tensor:
        nonlocal row_lse, exponentials
        count = columns.counted if options.symmetric else 0
        col_lse = row_lse.new_full((count,), -math.inf)
        numbers = rows.numbers_of(columns)
        if pairs and len(columns.y_hat):
            of_rows, col_lse, exponentials = ops.contrastive_stats(
                *(rows.x_hat, columns.y_hat, rows.scale, *rows.excluded(columns, numbers)),
                col_count=count,
                keep=options.keep and not ranks.ring,
                backend=options.backend,
            )
            row_lse = torch.logaddexp(row_lse, of_rows)
        found = [col_lse]
        if x_sums is not None and y_sums is not None and group_sizes is not None and numbers is not None:
            y_sums.add_(negated_sums(columns.y_hat, None, numbers, pairs))
            row_counts.add_(sizes(numbers)[rows.numbers])
            numbers = numbers[:count]
            found += [_row_dots(columns.y_hat[:count], x_sums, numbers), group_sizes[numbers]]
        return torch.stack(found, dim=1) if options.symmetric else col_lse.new_empty((columns.counted, 0))

    def merge(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat((torch.logaddexp(a[:, :1], b[:, :1]), a[:, 1:] + b[:, 1:]), dim=1)

    def home(found: Tensor) -> Tensor:
        if found.shape[1] == 0:
            return found[: ranks.counted[ranks.rank]]
        received = ranks.exchange(found)
        return torch.cat((received[..., :1].logsumexp(0), received[..., 1:].sum(0)), dim=1)

    found = ranks.visit(columns, find, merge, home, extra=False)
    col_lse, *sums = found.unbind(1) if found.shape[1] else (row_lse[:0],)
    col_dots, col_counts = sums or (row_lse[:0], row_counts.new_zeros(()))
    return _Stats(row_lse, col_lse.contiguous(), exponentials, y_sums, row_counts, col_dots, col_counts)


class _Smoothing(NamedTuple):
    """What the smoothing needs of each pair: see :func:`modest_align_kernels.backends.eager.pair_losses`."""

    slope: Tensor
    on_pair: Tensor
    row_share: Tensor  # row_negative_weight there
    col_share: Tensor
    sums: Tensor | None  # without groups: those of all ranks' x_hat and y_hat [2, 1, width], negated


def _smoothing(ranks: Ranks, rows: _Rows, own: Columns, stats: _Stats, pair_dot: Tensor, x_sums: Tensor) -> _Smoothing:
    pairs, sums, symmetric = len(rows.x_hat), None, rows.options.symmetric
    apart = torch.ones_like(pair_dot)
    if stats.y_sums is None or rows.ids is None or own.ids is None:
        sums = ranks.total(torch.stack((x_sums, negated_sums(own.y_hat, None, None, pairs))))
        x_sums, y_sums = sums
        col_dots = _row_dots(own.y_hat[:pairs], x_sums, None)
    else:
        y_sums, col_dots = stats.y_sums, stats.col_dots
        apart = (rows.ids != own.ids[:pairs]).to(apart.dtype)
    slope, on_pair, weights = torch.zeros_like(pair_dot), torch.zeros_like(pair_dot), []
    for wanted, negatives, dots in (
        (True, ranks.columns - stats.row_counts - apart, _row_dots(rows.x_hat, y_sums, rows.numbers)),
        (symmetric, sum(ranks.counted) - stats.col_counts - apart, col_dots),
    ):
        weight = negatives.reciprocal().masked_fill_(negatives <= 0, 0.0) if wanted else torch.zeros_like(pair_dot)
        on_pair.add_(weight.sign()).addcmul_(apart, weight)
        if wanted:
            slope.addcmul_(weight, dots)
        weights.append(weight)
    slope.addcmul_(pair_dot, on_pair).mul_(rows.scale * (0.5 if symmetric else 1.0))
    row_share, col_share = weights
    return _Smoothing(slope, on_pair, row_share, col_share, sums)


def _normalize(
    ranks: Ranks,
    features: Tensor,
    noise_stream: int,
    pair_hat: Tensor | None,
    seed: Tensor | None,
    noise_std: Tensor | None,
    options: Options,
) -> tuple[Tensor, ...]:
    """``perturb_normalize``, also of no rows; the noise is that of a row's number among all ranks'."""
    own, rank = ranks.counted[ranks.rank], ranks.rank
    parts = [(features, pair_hat, sum(ranks.counted[:rank]))]
    if seed is not None and len(features) > own:
        # All ranks' extra columns follow all counted ones.
        parts = [(features[:own], *parts[0][1:])]
        parts += [(features[own:], None, sum(ranks.counted) + sum(ranks.extra[:rank]))]

    def normalize(features: Tensor, pair_hat: Tensor | None, first_row: int) -> tuple[Tensor, ...]:
        if len(features) == 0:
            width, dtype = operand_width(features.shape[1], options.backend), accumulation_dtype(options.operand_dtype)
            nothing = features.new_empty(0, dtype=dtype)
            return features.new_empty((0, width), dtype=options.operand_dtype), nothing, nothing
        pair_hat = None if pair_hat is None or len(pair_hat) == 0 else pair_hat
        return ops.perturb_normalize(
            *(features, seed, noise_std, noise_stream, options.relative_noise, pair_hat, first_row),
            operand_dtype=options.operand_dtype,
            backend=options.backend,
        )

    results = [normalize(*part) for part in parts]
    return results[0] if len(results) == 1 else tuple(torch.cat(t) for t in zip(*results, strict=True))


class RanksLoss(torch.autograd.Function):
    """(x, y, scale, smoothing, ...) -> this rank's pairs' losses [B]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        smoothing: Tensor | None,
        row_ids: Tensor | None,
        col_ids: Tensor | None,
        seed: Tensor | None,
        noise_std: Tensor | None,
        options: Options,
        ranks: Ranks,
    ) -> Tensor:
        """As :meth:`modest_align_kernels.autograd.ContrastiveLoss.forward`, but ids as they were given."""
        pairs = len(x)
        x_hat, x_inv_norm, _ = _normalize(ranks, x, IMAGES, None, seed, noise_std, options)
        y_hat, y_inv_norm, pair_dot = _normalize(ranks, y, TEXTS, x_hat, seed, noise_std, options)
        rows = _rows(x_hat, scale, row_ids, True, options)
        own = ranks.local(y_hat, row_ids if col_ids is None else col_ids)
        columns = own if ranks.ring else ranks.gathered(own)
        x_sums = None if smoothing is None else negated_sums(x_hat, None, rows.numbers, pairs)
        stats = _stats(ranks, columns, rows, None if rows.numbers is None else x_sums)
        losses, row_weight, pair_weight = (scale.new_empty(pairs) for _ in range(3))
        col_weight = torch.empty_like(stats.col_lse)
        if pairs:
            losses, row_weight, col_weight, pair_weight, *_ = ops.pair_losses(
                *(stats.row_lse, stats.col_lse, pair_dot, scale, None, x_hat, y_hat, None, None),
                backend=options.backend,
            )
        smoothed: tuple[Tensor | None, ...] = (None,) * 4
        if smoothing is not None and x_sums is not None:
            slope, on_pair, *shares = _smoothing(ranks, rows, own, stats, pair_dot, x_sums)
            losses.addcmul_(smoothing, slope)
            pair_weight.addcmul_(smoothing, on_pair)
            smoothed = slope, *shares
        ctx.options, ctx.ranks, ctx.dtypes, ctx.features = options, ranks, (x.dtype, y.dtype), x.shape[1]
        ctx.set_materialize_grads(False)
        # Leads a second differentiation of the gradients back to here.
        ctx.save_for_backward(
            *(losses, x_hat, x_inv_norm, y_hat, y_inv_norm, scale, smoothing, row_ids, own.ids, *columns[:2]),
            *(stats.row_lse, stats.col_lse, stats.exponentials, row_weight, col_weight, pair_weight, *smoothed),
        )
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients to x, y, scale and smoothing."""
        gradients: tuple[Tensor | None, ...] = (None,) * 4
        if grad_losses is not None:
            with torch.no_grad():
                gradients = _loss_gradients(ctx, grad_losses)
            if torch.is_grad_enabled():
                gradients = OnlyFirstDerivatives.apply("modest_align_loss", ctx.saved_tensors[0], *gradients)
        return *gradients, *(None,) * 6


def _loss_gradients(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
    ranks, options = ctx.ranks, ctx.options
    _, x_hat, x_inv_norm, y_hat, y_inv_norm, scale, smoothing, row_ids, col_ids, *more = ctx.saved_tensors
    seen_y_hat, seen_ids, row_lse, col_lse, exponentials, row_weight, col_weight, pair_weight, *more = more
    slope, row_share, col_share, sums = more
    d_smoothing: Tensor | None = None
    largest, grad_losses = _largest_of_all(ranks, grad_losses)
    rows = _rows(x_hat, scale, row_ids, True, options)
    row_weight, pair_weight = row_weight * grad_losses, pair_weight * grad_losses
    vectors = [col_lse, col_weight * grad_losses] if options.symmetric else []
    smoothed: _Smoothed | None = None
    if smoothing is not None:
        smoothed = _Smoothed(smoothing, row_share * grad_losses, col_share * grad_losses, sums)
        if ctx.needs_input_grad[3]:
            d_smoothing = torch.dot(grad_losses, slope) * largest
        if sums is None:
            vectors.append(smoothed.col_share)
    columns = _with_vectors(ranks, ranks.local(y_hat, col_ids), seen_y_hat, seen_ids, vectors)
    factor = largest * (0.5 if options.symmetric else 1.0)
    sides = (x_hat, x_inv_norm), (y_hat, y_inv_norm)
    softmaxes = row_lse, row_weight, exponentials
    d_x, d_y, d_scale = _of_inputs(ctx, columns, rows, softmaxes, smoothed, sides, pair_weight, factor)
    shared = [d for d in (d_scale, d_smoothing) if d is not None]
    if shared:
        shared = list(ranks.total(torch.stack(shared)).div_(ranks.size))
    d_smoothing = None if d_smoothing is None else shared.pop()
    d_scale = None if d_scale is None else shared.pop()
    return d_x, d_y, d_scale, d_smoothing


class RanksLogsumexp(torch.autograd.Function):
    """(x, y, scale, ...) -> row_lse [B] and col_lse [N], of this rank's rows and columns with all ranks' others."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        row_ids: Tensor | None,
        col_ids: Tensor | None,
        options: Options,
        ranks: Ranks,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`modest_align_kernels.autograd.ContrastiveLogsumexp.forward`, but ids as they were given."""
        x_hat, x_inv_norm, _ = _normalize(ranks, x, IMAGES, None, None, None, options)
        y_hat, y_inv_norm, _ = _normalize(ranks, y, TEXTS, None, None, None, options)
        own = ranks.local(y_hat, col_ids)
        columns = own if ranks.ring else ranks.gathered(own)
        stats = _stats(ranks, columns, _rows(x_hat, scale, row_ids, False, options), None)
        ctx.options, ctx.ranks, ctx.dtypes, ctx.features = options, ranks, (x.dtype, y.dtype), x.shape[1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            *(stats.row_lse, stats.col_lse, x_hat, x_inv_norm, y_hat, y_inv_norm, scale, row_ids, col_ids),
            *(*columns[:2], stats.exponentials),
        )
        return stats.row_lse, stats.col_lse

    @staticmethod
    def backward(ctx: Any, grad_row: Tensor | None, grad_col: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients to x, y and scale."""
        row_lse, col_lse, *_ = ctx.saved_tensors
        # Which of them is None may not be the same on every rank.
        grad_row = torch.zeros_like(row_lse) if grad_row is None else grad_row
        grad_col = torch.zeros_like(col_lse) if grad_col is None else grad_col
        with torch.no_grad():
            gradients = _logsumexp_gradients(ctx, grad_row, grad_col)
        if torch.is_grad_enabled():
            gradients = OnlyFirstDerivatives.apply("contrastive_logsumexp", row_lse, *gradients)
        return *gradients, *(None,) * 4


def _logsumexp_gradients(ctx: Any, grad_row: Tensor, grad_col: Tensor) -> tuple[Tensor | None, ...]:
    ranks = ctx.ranks
    row_lse, col_lse, x_hat, x_inv_norm, y_hat, y_inv_norm, scale, row_ids, col_ids, *more = ctx.saved_tensors
    seen_y_hat, seen_ids, exponentials = more
    largest, row_weight, col_weight = _largest_of_all(ranks, grad_row, grad_col)
    columns = _with_vectors(ranks, ranks.local(y_hat, col_ids), seen_y_hat, seen_ids, [col_lse, col_weight])
    rows, softmaxes = _rows(x_hat, scale, row_ids, False, ctx.options), (row_lse, row_weight, exponentials)
    sides, no_pairs = ((x_hat, x_inv_norm), (y_hat, y_inv_norm)), row_lse.new_empty(0)
    d_x, d_y, d_scale = _of_inputs(ctx, columns, rows, softmaxes, None, sides, no_pairs, largest)
    return d_x, d_y, None if d_scale is None else ranks.total(d_scale).div_(ranks.size)


def _largest_of_all(ranks: Ranks, *weights: Tensor) -> tuple[Tensor, ...]:
    """The largest absolute value on any rank, and the weights over it: one unit for all, in which float16 holds G."""
    # Zeros, so that there is always one.
    sizes = [torch.cat((weight.abs(), weight.new_zeros(1))).amax() for weight in weights]
    largest = ranks.total(torch.stack(sizes).amax(), dist.ReduceOp.MAX)
    largest = largest.masked_fill(largest == 0, 1.0)
    return largest, *(weight / largest for weight in weights)


class _Smoothed(NamedTuple):
    """What the smoothing adds to the gradients."""

    smoothing: Tensor
    row_share: Tensor  # [B], a negative's part in this rank's rows' gradients
    col_share: Tensor  # [B], in its counted columns'
    sums: Tensor | None  # of _Smoothing: without groups


def _with_vectors(
    ranks: Ranks, own: Columns, seen_y_hat: Tensor, seen_ids: Tensor | None, vectors: list[Tensor]
) -> Columns:
    """The columns of the forward, with [counted] vectors of this rank's."""
    stacked = torch.stack(vectors, dim=1) if vectors else None
    own = own._replace(vectors=stacked)
    if ranks.ring:
        return own
    stacked = None if stacked is None else ranks.gather_counted(stacked)
    return Columns(seen_y_hat, seen_ids, stacked, sum(ranks.counted), True)


def _of_inputs(
    ctx: Any,
    columns: Columns,
    rows: _Rows,
    softmaxes: tuple[Tensor, Tensor, Tensor | None],
    smoothed: _Smoothed | None,
    sides: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    pair_weight: Tensor,
    factor: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to x, y and scale, that of this rank's rows, of those that are wanted."""
    want_x, want_y, want_scale = ctx.needs_input_grad[:3]
    run_x = want_x or (want_scale and not want_y)  # either side gives the scale's
    if not (run_x or want_y):
        return None, None, None
    grad_x, grad_y = _products(ctx.ranks, columns, rows, *softmaxes, smoothed, run_x, want_y)
    (x_hat, _), (y_hat, _) = sides
    if smoothed is not None and smoothed.sums is not None:
        _smooth_without_groups(ctx.ranks, smoothed, smoothed.sums, x_hat, y_hat, grad_x, grad_y)
    d_x = d_y = dot = None
    unsmoothed = None, None, None, pair_weight, pair_weight  # the rest is added
    of_pairs = pair_weight, rows.scale, factor, *unsmoothed
    if grad_x is not None:
        d_x, dot = _through_normalisation(ctx, 0, grad_x, *sides[0], y_hat, *of_pairs)
    if grad_y is not None:
        d_y, dot = _through_normalisation(ctx, 1, grad_y, *sides[1], x_hat, *of_pairs)
    return d_x if want_x else None, d_y, dot.sum() if want_scale and dot is not None else None


def _smooth_without_groups(
    ranks: Ranks,
    smoothed: _Smoothed,
    sums: Tensor,
    x_hat: Tensor,
    y_hat: Tensor,
    grad_x: Tensor | None,
    grad_y: Tensor | None,
) -> None:
    smoothing, row_share, col_share, _ = smoothed
    weighted = [negated_sums(t, share, None, 0) for t, share in ((x_hat, row_share), (y_hat, col_share))]
    (x_sums, y_sums), (x_weighted, y_weighted) = sums, ranks.total(torch.stack(weighted))
    if grad_x is not None:
        _add_smoothing(grad_x, smoothing, row_share, (y_sums, y_weighted), None)
    if grad_y is not None:
        _add_smoothing(grad_y, smoothing, col_share, (x_sums, x_weighted), None)


def _through_normalisation(ctx: Any, side: int, grad: Tensor, *terms: Any) -> tuple[Tensor, Tensor]:
    if len(grad) == 0:
        return grad.new_empty((0, ctx.features), dtype=ctx.dtypes[side]), grad.new_empty(0)
    return through_normalisation(ctx, side, grad, *terms)


def _products(
    ranks: Ranks,
    columns: Columns,
    rows: _Rows,
    row_lse: Tensor,
    row_weight: Tensor,
    exponentials: Tensor | None,
    smoothed: _Smoothed | None,
    want_x: bool,
    want_y: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """G Y_hat of this rank's rows and G^T X_hat of its columns, with what the smoothing adds where there are groups."""
    pairs, options, numbers = len(rows.x_hat), rows.options, rows.numbers
    grad_x = row_lse.new_zeros((pairs, rows.x_hat.shape[1] if want_x else 0))
    met = False
    # By a row's number, sums over the columns, and weighted ones; likewise over this rank's rows.
    y_sums: tuple[Tensor, ...] = ()
    x_sums: tuple[Tensor, ...] = ()
    grouped = smoothed is not None and smoothed.sums is None
    if smoothed is not None and grouped:
        x_sums = tuple(negated_sums(rows.x_hat, share, numbers, pairs) for share in (None, smoothed.row_share))
        y_sums = tuple(torch.zeros_like(t) for t in x_sums)

    def find(columns: Columns) -> Tensor:
        nonlocal grad_x, met
        y_hat, vectors = columns.y_hat, columns.vectors
        col_numbers = rows.numbers_of(columns)
        col_lse = col_weight = row_lse.new_empty(0)
        if options.symmetric and vectors is not None:
            col_lse, col_weight = vectors[:, 0].contiguous(), vectors[:, 1].contiguous()
        grad_y = row_lse.new_zeros((len(y_hat), y_hat.shape[1] if want_y else 0))
        if pairs and len(y_hat):
            of_rows, grad_y_of_rows = ops.contrastive_grads(
                *(rows.x_hat, y_hat, rows.scale, row_lse, col_lse, row_weight, col_weight),
                *(*rows.excluded(columns, col_numbers), exponentials),
                want_x=want_x,
                want_y=want_y,
                backend=options.backend,
            )
            grad_x = grad_x.add_(of_rows) if met else of_rows
            grad_y, met = grad_y_of_rows if want_y else grad_y, True
        if smoothed is not None and vectors is not None and grouped:
            col_share = vectors[:, -1]
            for total, share in zip(y_sums, (None, col_share), strict=True):
                total.add_(negated_sums(y_hat, share, col_numbers, pairs))
            if want_y:
                _add_smoothing(grad_y, smoothed.smoothing, col_share, x_sums, col_numbers)
        return grad_y

    grad_y = ranks.visit(columns, find, lambda a, b: a.add_(b), ranks.sum_to_owners, extra=True)
    if want_x and smoothed is not None and grouped:
        _add_smoothing(grad_x, smoothed.smoothing, smoothed.row_share, y_sums, numbers)
    return grad_x if want_x else None, grad_y if want_y else None


class Total(torch.autograd.Function):
    """The sum over all ranks of a tensor, on every rank."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks, mean: bool) -> Tensor:
        """``mean``: the gradient is the mean over all ranks of theirs; else their sum."""
        ctx.ranks, ctx.mean = ranks, mean
        return ranks.total(tensor.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of all ranks that each rank's part of the sum gets."""
        total = ctx.ranks.total(grad.clone())
        return total / ctx.ranks.size if ctx.mean else total, None, None


def broadcast_seed(ranks: Ranks, seed: Tensor | None) -> Tensor | None:
    """The first rank's seed, on every rank; no host waits for it."""
    if seed is not None:
        dist.broadcast(seed, group=ranks.group, group_src=0)
    return seed


def ring_is_better(strategy: str, columns: int, options: Options, features: int) -> bool:
    """Whether the columns go around: by name, or where all of them and their gradient would take too much memory."""
    of_element = options.operand_dtype.itemsize + accumulation_dtype(options.operand_dtype).itemsize
    return strategy == "ring" or (strategy == "auto" and columns * features * of_element > GATHER_BYTES)
