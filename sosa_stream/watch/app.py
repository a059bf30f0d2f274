"""The terminal: looks again and again, shows the last look, and asks for what keys say once it is confirmed.

Threads of their own look and ask: whatever a daemon does, the terminal answers. Nothing is decided here: what is shown,
and what may be asked of it, says `sosa_stream.watch.model`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import ClassVar

from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.events import Resize
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Static
from textual.widgets.data_table import ColumnKey

from sosa_stream.cli.incident_words import whole
from sosa_stream.errors import SosaError, describe
from sosa_stream.visible import visible
from sosa_stream.watch import asks, model
from sosa_stream.watch.asks import Ask
from sosa_stream.watch.daemons import Daemons
from sosa_stream.watch.model import Look, Table, Tone

STYLES = {
    Tone.PLAIN: "",
    Tone.QUIET: "dim",
    Tone.GOOD: "green",
    Tone.WARNING: "yellow",
    Tone.CRITICAL: "bold red",
}
TABLES: dict[str, Table] = {
    "runs": model.RUNS,
    "incidents": model.INCIDENTS,
    "fixes": model.FIXES,
    "ranks": model.RANKS,
}
GAP = 1
"""Characters between columns."""
LEAST_WIDTH = 10
"""Of the column that has what room is left; a terminal narrower than that is scrolled."""


class Confirm(ModalScreen[bool]):
    """A question that only ``y`` answers with yes."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "dismiss(True)", "yes"),
        Binding("n,escape,enter,q", "dismiss(False)", "no"),
    ]

    def __init__(self, question: str, who: str) -> None:
        super().__init__()
        self._question = f"{question}\n\nIt is recorded as asked for by {who}.\n\ny  yes        n  no"

    def compose(self) -> ComposeResult:
        yield Static(self._question, id="box", markup=False)


class Details(ModalScreen[None]):
    """All of one record."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,enter,q", "dismiss", "back")]

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="box"):
            yield Static(self._text, markup=False)


class Watch(App[None]):
    """``sosa watch``.

    ``who`` is told to the daemon with whatever is asked for. ``run`` is looked at first; none: the first that is live.
    """

    CSS = """
    Screen { layout: vertical; }
    DataTable { height: 1fr; min-height: 3; scrollbar-size: 1 1; }
    #runs { height: auto; min-height: 2; max-height: 5; }
    #ranks { max-height: 6; }
    Static { height: auto; }
    #message { max-height: 2; text-style: bold; }
    #headline { max-height: 2; }
    #curve { height: 1; }
    ModalScreen { align: center middle; }
    #box { width: 90%; max-width: 110; max-height: 90%; height: auto; border: heavy $primary; padding: 0 1; }
    """
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("k", "ask('acknowledge')", "ack incident"),
        Binding("a", "ask('approve')", "approve fix"),
        Binding("u", "ask('undo')", "undo fix"),
        Binding("p", "ask('pause')", "pause/resume"),
        Binding("tab", "app.focus_next", "next table"),
        Binding("q,ctrl+c", "quit", "quit"),
    ]

    def __init__(self, daemons: Daemons, *, who: str, run: str | None = None, every_seconds: float = 1.0) -> None:
        super().__init__()
        self._daemons = daemons
        self._who = who
        self._chosen = run
        self._every_seconds = every_seconds
        self._look = Look()
        self._looked_at = 0.0
        self._is_looking = False
        self._said = ""
        self._lost = ""

    @property
    def look(self) -> Look:
        """What is shown."""
        return self._look

    def compose(self) -> ComposeResult:
        yield self._table("runs")
        yield Static("waiting for a daemon", id="headline", markup=False)
        yield Static("", id="curve", markup=False)
        for name in ("incidents", "fixes", "ranks"):
            yield self._table(name)
        yield Static("", id="message", markup=False)
        yield Footer()

    def _table(self, name: str) -> DataTable[Text]:
        table: DataTable[Text] = DataTable(id=name, cursor_type="row", cell_padding=0)
        for heading, width in zip(TABLES[name].headings, TABLES[name].widths, strict=True):
            table.add_column(heading, key=heading, width=(width or LEAST_WIDTH) + GAP)
        return table

    def on_mount(self) -> None:
        self.set_interval(self._every_seconds, self._look_again)
        self._look_again()

    def on_resize(self, event: Resize) -> None:
        for name, table in TABLES.items():
            taken = sum((width or 0) + GAP for width in table.widths) + 1  # a scroll bar
            open_column = table.headings[table.widths.index(None)]
            shown = self._rows_of(name)
            shown.columns[ColumnKey(open_column)].width = max(LEAST_WIDTH, event.size.width - taken) + GAP
        self._show()

    def _look_again(self) -> None:
        if not self._is_looking:  # a daemon that is slow is not asked more often
            self._is_looking = True
            self._look_now()

    @work(thread=True, exit_on_error=False)
    def _look_now(self) -> None:
        name = self._chosen
        try:
            look, error = self._daemons.look(name), ""
        except SosaError as failure:
            look, error = None, describe(failure)
        except Exception as failure:  # of ours: to be told, and no reason to end
            look, error = None, f"cannot be shown: {describe(failure)}"
        self.call_from_thread(self._take, name, look, error)

    def _take(self, name: str | None, look: Look | None, error: str) -> None:
        self._is_looking = False
        if look is not None and name == self._chosen:
            self._look, self._looked_at = look, time.time()
        self._lost = error
        self._show()

    def _show(self) -> None:
        if self._looked_at:
            for name in TABLES:
                self._fill(name)
            self._write("headline", model.headline(self._look))
            self._write("curve", model.curve(self._look, self.size.width))
        self._tell()

    def _write(self, name: str, words: str) -> None:
        # Of the lowest screen: a question may lie over it.
        self.screen_stack[0].query_one(f"#{name}", Static).update(words)

    def _rows_of(self, name: str) -> DataTable[Text]:
        table: DataTable[Text] = self.screen_stack[0].query_one(f"#{name}", DataTable)
        return table

    def _fill(self, name: str) -> None:
        """Rows as they are now; the cursor stays with its row, wherever that has gone."""
        table = self._rows_of(name)
        rows = list(TABLES[name].rows(self._look, time.time()))
        chosen = self._key(name)
        with self.batch_update():
            table.clear()
            for row in rows:
                style = STYLES[row.tone]
                if name == "runs" and self._look.run is not None and row.key == self._look.run["run"]:
                    style += " bold"
                cells = [Text(cell, style=style) for cell in row.cells]
                for cell, column in zip(cells, table.ordered_columns, strict=True):
                    cell.truncate(column.width - GAP, overflow="ellipsis")
                table.add_row(*cells, key=row.key)
            keys = [row.key for row in rows]
            if chosen in keys:
                table.move_cursor(row=keys.index(chosen), animate=False)

    def _key(self, name: str) -> str:
        """Of the row under a table's cursor; empty where it has none."""
        table = self._rows_of(name)
        if not table.is_valid_coordinate(table.cursor_coordinate):
            return ""
        return str(table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value)

    def _tell(self) -> None:
        words = self._said
        if self._lost:
            since = f"as of {time.strftime('%H:%M:%S', time.localtime(self._looked_at))}: " if self._looked_at else ""
            words = f"{since}{self._lost}; trying again"
        self._write("message", visible(words))

    def say(self, words: str) -> None:
        """Show a sentence until there is another."""
        self._said = f"{time.strftime('%H:%M:%S')} {words}"
        self._tell()

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        key = str(event.row_key.value)
        match event.data_table.id:
            case "runs":
                self._chosen = key
                self._look_again()
            case "incidents" if record := self._look.incident(key):
                self.push_screen(Details(whole(record)))
            case "fixes" if record := self._look.command(key):
                self.push_screen(Details(model.whole_fix(record)))

    def action_ask(self, what: str) -> None:
        """Ask for it at once, or after a question; or say why it cannot be asked for."""
        keys: dict[str, Callable[[], Ask | str]] = {
            "acknowledge": lambda: asks.acknowledging(self._look, self._key("incidents")),
            "approve": lambda: asks.approving(self._look, self._key("fixes")),
            "undo": lambda: asks.undoing(self._look, self._key("fixes")),
            "pause": lambda: asks.pausing(self._look),
        }
        asked = keys[what]()
        if isinstance(asked, str):
            self.say(asked)
        elif asked.question:
            self.push_screen(Confirm(asked.question, self._who), partial(self._answered, asked))
        else:
            self._ask(asked)

    def _answered(self, asked: Ask, yes: bool | None) -> None:
        if yes:
            self._ask(asked)
        else:
            self.say(f"{asked.what}: left as it is")

    @work(thread=True, exit_on_error=False)
    def _ask(self, asked: Ask) -> None:
        self.call_from_thread(self.say, f"{asked.what}: asked for")
        try:
            words = self._daemons.ask(asked, self._who)
        except Exception as error:
            words = f"not done: {describe(error)}"
        self.call_from_thread(self.say, f"{asked.what}: {words}")
        self.call_from_thread(self._look_again)
