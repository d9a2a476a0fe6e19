"""Scheme `window` of `sparse-attention`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from effc.errors import InputError, UsageError
from effc.ir.analysis.cached_attention import CachedAttentionSite
from effc.ir.dialect.cache_storage import DenseStorage
from effc.ir.dialect.selections import WindowSelection
from effc.passes.attention.selection_schemes.base import Change, SelectionScheme


@dataclass(frozen=True)
class WindowScheme(SelectionScheme):
    """The last tokens in a ring and the first ones.

    Attributes: those of the pass.

    Raises:
        UsageError: A value that there is not.
    """

    recent: int = 1024
    sinks: int = 4
    positions: str = "compact"

    def __post_init__(self) -> None:
        if self.recent == 0:
            raise UsageError("recent is 0, scheme=window needs at least 1.")
        try:
            self._selection()
        except InputError as error:
            raise UsageError(f"sparse-attention: {error}.") from error

    @property
    def rotates(self) -> bool:
        """Sinks that move must be rotated by the op."""
        return self.positions != "keep"

    def change(self, site: CachedAttentionSite) -> Change:
        """A window, a ring that holds it, and sinks."""
        storage, selection = site.storage, self._selection()
        if isinstance(storage, DenseStorage) and not site.form.window:
            storage = DenseStorage(storage.dtype, self.recent)
        form = replace(site.form, window=self.recent)
        far = selection.far_position(self.recent)
        return Change(form, storage, selection, None if far is None else range(far, far + 1))

    def _selection(self) -> WindowSelection:
        return WindowSelection(self.sinks, self.positions)
