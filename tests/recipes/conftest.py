import sys

import pytest

from tests.recipes.text_runs import write_corpus


@pytest.fixture(autouse=True, scope="module")
def no_process_arguments():
    """Hides pytest's own arguments, of which Lightning's command line would warn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["recipes.text_lm"])
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of make-believe code that a module's tests share."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))
