"""The guard against releases of transformers that are too old."""

import pytest
import transformers

from hf_jetflow._compat import check_transformers


@pytest.mark.parametrize("version", ["5.17.0", "5.23.0", "5.24.0.dev0", transformers.__version__])
def test_supported_releases_pass(version):
    check_transformers(version)


@pytest.mark.parametrize("version", ["4.57.1", "5.16.3", "5.5.2"])
def test_an_old_release_is_refused_with_the_command_that_helps(version):
    with pytest.raises(ImportError, match=rf"found {version}.*pip install 'transformers>=5.17,<6'"):
        check_transformers(version)
