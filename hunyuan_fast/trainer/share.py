"""Which samples of a batch are whose, where several processes train together."""

from dataclasses import dataclass

from hunyuan_fast.distributed.shards import part, split_sizes


@dataclass(frozen=True)
class Share:
    """Which samples of a batch are those of this process.

    The batch is drawn whole by everybody, from the step alone; each takes its rows. The mean of the
    losses over ``count`` processes, each times its weight, is the mean over the batch.
    """

    index: int = 0
    count: int = 1

    def sizes(self, batch: int) -> tuple[int, ...]:
        """Samples of each process."""
        return split_sizes(batch, self.count)

    def rows(self, batch: int) -> slice:
        """Samples to compute: never none, because all processes take part in what is sent."""
        rows = part(self.sizes(batch), self.index)
        return rows if rows.start < rows.stop else slice(0, 1)

    def weight(self, batch: int) -> float:
        """Factor on the mean loss of the rows; 0 where they belong to somebody else."""
        return self.sizes(batch)[self.index] * self.count / batch


ALONE = Share()
