"""What :func:`mmfused.warmup` returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..kernels.jobs import Outcome

_HEADER = f"{'kernel':34} {'from':8} {'regs':>4} {'spill':>5} {'shared':>7}"


@dataclass(frozen=True)
class WarmedKernel:
    """A kernel in a :class:`WarmupReport`; its string is a row of the printed table."""

    op: str
    name: str
    outcome: Outcome | None  # None: workers=0, or another rank could not compile it
    limit: int  # bytes of shared memory that a block may use

    @property
    def fault(self) -> str:
        """What is wrong with the kernel, or an empty string."""
        outcome = self.outcome or Outcome()
        if outcome.error:
            return outcome.error
        if (outcome.shared or 0) > self.limit:
            return f"needs more than the GPU's {self.limit} bytes of shared memory"
        return f"spills {outcome.spilled} bytes per thread" if outcome.spilled else ""

    def __str__(self) -> str:
        outcome = self.outcome or Outcome()
        source = "compiler" if self.outcome else "-"
        source = "cache" if outcome.cached else "-" if outcome.error else source
        numbers = (outcome.registers, outcome.spilled, outcome.shared)
        regs, spilled, shared = ("-" if x is None else str(x) for x in numbers)
        row = f"{self.op + '.' + self.name:34} {source:8} {regs:>4} {spilled:>5} {shared:>7}"
        return f"{row}  <- {self.fault}" if self.fault else row


@dataclass
class WarmupReport:
    """What :func:`warmup` did; ``print(report)`` shows it as a table.

    Attributes:
        arch: the architecture that the kernels are for, such as "sm_90".
        kernels: the distinct kernels of all batches, each with ``op``, ``name``, ``outcome``
            (``registers``, ``spilled`` and ``shared`` in bytes, ``cached``, ``seconds``, ``error``)
            and ``fault``.
        seconds: the time of the whole call.
        ran: whether the step also ran on the GPU.
        late: kernels that were compiled only while the step ran, because the recording missed them.
        notes: what could not be done, and why; a sentence each.

    Examples:
        >>> import mmfused
        >>> loss = mmfused.MaskedInfoNCE()
        >>> rows = [((64, 32), (64, 32)), ((100, 32), (100, 32))]  # two batches
        >>> report = mmfused.warmup(loss, rows, input_gradients=True, arch="sm_80", workers=0)
        >>> len(report.kernels) > 5, report.compiled, report.ran, report.faults
        (True, 0, False, [])
    """

    arch: str
    kernels: list[WarmedKernel] = field(default_factory=list)
    seconds: float = 0.0
    ran: bool = False
    late: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def compiled(self) -> int:
        """The number of kernels that this process compiled before the step ran."""
        outcomes = [kernel.outcome for kernel in self.kernels if kernel.outcome]
        return sum(not outcome.cached and not outcome.error for outcome in outcomes)

    @property
    def cached(self) -> int:
        """The number of kernels that were in Triton's cache."""
        return sum(bool(kernel.outcome and kernel.outcome.cached) for kernel in self.kernels)

    @property
    def faults(self) -> list[str]:
        """A sentence for each kernel that spills, needs too much memory or does not compile."""
        return [f"{k.op}.{k.name}: {k.fault}" for k in self.kernels if k.fault]

    def __str__(self) -> str:
        line = (
            f"warmup for {self.arch}: {len(self.kernels)} kernels, {self.compiled} compiled, "
            f"{self.cached} in the cache, {self.seconds:.1f} s"
        )
        line += f"; {self.late} compiled while the step ran" if self.late else ""
        rows = [_HEADER, *map(str, self.kernels)] if self.kernels else []
        return "\n".join([line, *rows, *(f"note: {note}" for note in self.notes)])
