"""The stub libraries refuse to stand beside the real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from cann_stubs import RealCannError, refuse_real_cann


@pytest.mark.parametrize("variable", ["ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ATB_HOME_PATH"])
def test_an_environment_of_cann_is_refused(variable: str, tmp_path: Path) -> None:
    with pytest.raises(RealCannError, match=variable):
        refuse_real_cann({variable: "/usr/local/Ascend"}, tmp_path)


@pytest.mark.parametrize("path", ["usr/local/Ascend", "dev/davinci0", "dev/davinci_manager"])
def test_an_installation_or_a_card_is_refused(path: str, tmp_path: Path) -> None:
    (tmp_path / path).mkdir(parents=True)
    with pytest.raises(RealCannError, match=Path(path).name):
        refuse_real_cann({}, tmp_path)


def test_a_machine_without_any_of_it_is_taken(tmp_path: Path) -> None:
    refuse_real_cann({}, tmp_path)
