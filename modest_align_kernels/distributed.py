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

beside vectors of length N. Where that sends less the texts stay and the images travel: read X for Y and B for N.

With J_r what rank r makes of its outputs, each rank's features get the derivative of sum_r J_r, as autograd has it of a
sum over ranks; numbers that all ranks share get 1/W of it, the same everywhere. So the mean over ranks that DDP and
FSDP take of parameters' gradients is the derivative of mean_r J_r, of the loss itself where every rank returns it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from modest_align_kernels.autograd import Options
from modest_align_kernels.backends import WORKSPACE_BYTES, accumulation_dtype

# Gathered columns and their gradient may take so much; past it "auto" is the ring.
GATHER_BYTES = 16 * WORKSPACE_BYTES
_Result = TypeVar("_Result")
_Either = TypeVar("_Either")
_Or = TypeVar("_Or")

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
        hat: [n, width].
        ids: int64 of the first columns, those that may be in a group; None: there are no groups.
        vectors: [counted, K], what the backward must know of each; None in the forward.
        counted: the first columns, that have a logsumexp of their own.
        own_first: the first ones are this rank's.
    """

    hat: Tensor
    ids: Tensor | None
    vectors: Tensor | None
    counted: int
    own_first: bool


@dataclass(frozen=True)
class Ranks:
    """How the columns are spread over a group.

    Attributes:
        group: the ranks.
        counted: of each rank, the columns that have a logsumexp of their own; in the loss, its pairs.
        extra: of each rank, the texts that follow them and have none.
        extra_ids: the extra texts have ids, too, where there are groups.
        ring: else gather.
        swapped: the texts are the rows, and the images the columns, which travel.
    """

    group: ProcessGroup
    counted: list[int]
    extra: list[int]
    extra_ids: bool
    ring: bool
    swapped: bool = False

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        return self.group.rank()

    @property
    def size(self) -> int:
        """W."""
        return self.group.size()

    @property
    def extra_columns(self) -> list[int]:
        """Of each rank, those that travel and are not counted."""
        return [0] * self.size if self.swapped else self.extra

    @property
    def at_once(self) -> bool:
        """All columns are one block. Not where texts without an image are rows: its diagonal would not end at them."""
        return not (self.ring or (self.swapped and self.extra[self.rank]))

    def ordered(self, of_images: _Either, of_texts: _Or) -> tuple[_Either | _Or, _Either | _Or]:
        """Of the rows and of the columns; from these again of the images and of the texts."""
        return (of_texts, of_images) if self.swapped else (of_images, of_texts)

    def total(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """``tensor``, by now the sum over all ranks."""
        dist.all_reduce(tensor, op, self.group)
        return tensor

    def local(self, hat: Tensor, ids: Tensor | None) -> Columns:
        """This rank's columns."""
        return Columns(hat, ids, None, self.counted[self.rank], True)

    def gathered(self, own: Columns) -> Columns:
        """All ranks' columns: this rank's counted ones, the others', then the extra ones in the same order."""
        ids = None if own.ids is None else self._gather(own.ids, self.extra_ids)
        return Columns(self._gather(own.hat, True), ids, None, sum(self.counted), True)

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
        if self.ring:
            return self._around(columns, find, merge, extra)
        if self.at_once:
            return home(find(columns))
        own = self.counted[self.rank]
        found = []
        for i, counted, own_first in (slice(own), own, True), (slice(own, None), columns.counted - own, False):
            ids, vectors = (None if t is None else t[i] for t in columns[1:3])
            found.append(find(Columns(columns.hat[i], ids, vectors, counted, own_first)))
        return home(torch.cat(found))

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
        return [self.counted, self.extra_columns] if extra and any(self.extra_columns) else [self.counted]

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
        if 0 in self.counted:  # NCCL's first transfers in a group want all ranks, also those with nothing to pass on
            self.total(columns.hat.new_zeros(1))
        returning = None
        for step in range(self.size):
            # Whose columns come next; after the last step, what the others found out about this rank's own.
            next_owner = (self.rank - step - 1) % self.size
            counted, total = self.counted[next_owner], self.counted[next_owner] + self.extra_columns[next_owner]
            coming = None
            if step + 1 < self.size:
                # Sent on before they are looked at: the one takes place during the other.
                lengths = total, total if self.extra_ids else counted, counted
                coming = self._pass_on((columns.hat, columns.ids, columns.vectors), lengths, 0)
            found = find(columns)
            if step == 0:
                at_home = found  # the others' come after the last step
            else:
                found = found if returning is None else merge(returning()[0], found)
                returning = self._pass_on((found,), (total if extra else counted,), 3)
            if coming is not None:
                hat, ids, vectors = coming()
                columns = Columns(hat, ids, vectors, counted, False)
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


def traffic(rows: int, features: Tensor, options: Options) -> int:
    """About what travels of a side that does, with its gradient if there is one, in bytes."""
    # Without gradients requires_grad may differ from rank to rank.
    wanted = options.keep and features.requires_grad
    gradient = accumulation_dtype(options.operand_dtype).itemsize if wanted else 0
    return rows * (options.operand_dtype.itemsize + gradient)


def ring_is_better(strategy: str, columns: int, options: Options, features: int) -> bool:
    """Whether the columns go around: by name, or where all of them and their gradient would take too much memory."""
    of_element = options.operand_dtype.itemsize + accumulation_dtype(options.operand_dtype).itemsize
    return strategy == "ring" or (strategy == "auto" and columns * features * of_element > GATHER_BYTES)
