"""Which positions of a feature map are active, and maps that hold these alone.

An image is cut into a grid of cells, and the same number of cells is visible in each image. At every resolution of a
convnet the visible cells hold the same number m of positions in each image, so that a map of B x C x H x W can be
*packed* into B x C x 1 x m. Whatever treats positions alike then needs to know of no mask: a 1 x 1 convolution, an
activation or a layer norm costs m positions instead of H * W, and a mean over the last two dimensions, a batch norm
or a global response norm is one over active positions.

- Positions follow from the visible cells by arithmetic: shapes depend on no data and nothing waits for a device.
- Rows of C values lie together in memory (channels last), so that packing and unpacking copy whole rows.
"""

import torch
from torch import Tensor

from prelude.data.errors import UserError

Cell = tuple[int, int]  # (rows, columns) of positions that a visible cell has at some resolution


class ActivePositions:
    """The visible cells of one batch, at every resolution.

    visible: (B, K) int64, the visible cells of each image, by raster order of the grid. grid: (rows, columns).
    """

    def __init__(self, visible: Tensor, grid: tuple[int, int]):
        self.visible, self.grid = visible, grid
        self._cells: dict[int, Cell] = {}  # by the number of active positions of an image
        self._index: dict[Cell, Tensor] = {}

    def cell_at(self, height: int, width: int) -> Cell:
        """Positions of a cell in a map of this size. Raises UserError where cells are no whole positions."""
        rows, columns = self.grid
        if height % rows or width % columns:
            raise UserError(
                f"a map of {height} x {width} positions is no whole number for each of {rows} x {columns} masked cells"
            )
        cell = (height // rows, width // columns)
        known = self._cells.setdefault(self.visible.shape[1] * cell[0] * cell[1], cell)
        if known != cell:
            raise UserError(f"cells of {known} and of {cell} positions, which are as many, cannot be told apart")
        return cell

    def cell_of(self, packed: Tensor) -> Cell:
        """The resolution at which `packed` (B, C, 1, m) lies. Raises UserError when it is no packed map."""
        if packed.ndim != 4 or packed.shape[2] != 1 or packed.shape[3] not in self._cells:
            raise UserError(f"a tensor of shape {tuple(packed.shape)} is no map of active positions")
        return self._cells[packed.shape[3]]

    def is_packed(self, tensor: Tensor) -> bool:
        """Whether this is a packed map, channels first (B, C, 1, m) or last (B, 1, m, C)."""
        if tensor.ndim != 4 or len(tensor) != len(self.visible):
            return False
        _, first, second, last = tensor.shape
        return (second == 1 and last in self._cells) or (first == 1 and second in self._cells)

    def index(self, cell: Cell) -> Tensor:
        """(B * m,) int64: where the active positions lie among the B * H * W of a map."""
        if cell not in self._index:
            self._index[cell] = self._computed_index(cell)
        return self._index[cell]

    def pack(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 1, m), its active positions."""
        cell = self.cell_at(*maps.shape[2:])
        rows = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])  # (B * H * W, C)
        return _as_map(_Gather.apply(rows, self.index(cell)), len(maps))

    def unpack(self, packed: Tensor, fill: float = 0.0) -> Tensor:
        """(B, C, 1, m) to (B, C, H, W), with `fill` at inactive positions."""
        cell = self.cell_of(packed)
        rows = _Scatter.apply(_rows(packed), self.index(cell), self._num_positions(cell), fill)
        return self._unfolded(rows, cell)

    def unpack_onto(self, packed: Tensor, token: Tensor) -> Tensor:
        """(B, C, 1, m) to (B, C, H, W), with `token` (C,) at inactive positions, which gets their gradient."""
        cell = self.cell_of(packed)
        rows = _rows(packed)
        background = token.to(rows.dtype).expand(self._num_positions(cell), -1)
        return self._unfolded(background.index_copy(0, self.index(cell), rows), cell)

    def _num_positions(self, cell: Cell) -> int:
        return len(self.visible) * self.grid[0] * self.grid[1] * cell[0] * cell[1]

    def _unfolded(self, rows: Tensor, cell: Cell) -> Tensor:
        height, width = self.grid[0] * cell[0], self.grid[1] * cell[1]
        return rows.view(len(self.visible), height, width, -1).permute(0, 3, 1, 2)

    def _computed_index(self, cell: Cell) -> Tensor:
        (rows, columns), (height, width), device = self.grid, cell, self.visible.device
        first_row = self.visible // columns * height  # (B, K)
        first_column = self.visible % columns * width
        row = first_row[..., None] + torch.arange(height, device=device)  # (B, K, h)
        column = first_column[..., None] + torch.arange(width, device=device)  # (B, K, w)
        image = torch.arange(len(self.visible), device=device)[:, None, None, None] * (rows * height)
        return ((image + row[..., None]) * (columns * width) + column[..., None, :]).flatten()  # (B * K * h * w,)


def _rows(packed: Tensor) -> Tensor:
    """(B, C, 1, m) to (B * m, C): a view, as long as the channels lie last in memory."""
    return packed.permute(0, 2, 3, 1).reshape(-1, packed.shape[1])


def _as_map(rows: Tensor, batch: int) -> Tensor:
    """(B * m, C) to (B, C, 1, m), a view."""
    return rows.view(batch, 1, -1, rows.shape[1]).permute(0, 3, 1, 2)


class _Gather(torch.autograd.Function):
    """rows[index] for an index without repetitions, whose gradient therefore needs no addition."""

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = len(rows)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_rows, grad.shape[1]).index_copy_(0, index, grad), None


class _Scatter(torch.autograd.Function):
    """The inverse of `_Gather`, with a constant in the other rows."""

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, num_rows: int, fill: float) -> Tensor:
        ctx.save_for_backward(index)
        return rows.new_full((num_rows, rows.shape[1]), fill).index_copy_(0, index, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (index,) = ctx.saved_tensors
        return grad.index_select(0, index), None, None, None
