import json

import pytest
from tests.kernel_files import candidate, metadata_of, write

from kernelswap.errors import Refused
from kernelswap.verifiers.digest import DigestVerifier


def check(build, metadata=None):
    return DigestVerifier().check(candidate(), metadata or metadata_of(build), build)


def test_every_file_as_published(tmp_path):
    assert check(write(tmp_path / "b")).statement == "2 files match their sha256"


def test_changed_missing_and_unknown_files_are_all_named(tmp_path):
    build = write(tmp_path / "b", {"a.py": "1", "b.py": "2", "c.py": "3"})
    (build / "a.py").write_text("9")
    (build / "b.py").unlink()
    (build / "d.py").write_text("4")
    with pytest.raises(Refused) as e:
        check(build)
    assert e.value.found.splitlines() == [
        "a.py does not have the digest that metadata.json states",
        "b.py is missing",
        "d.py is not listed in metadata.json",
    ]


def test_a_build_without_digests_is_accepted_and_the_evidence_says_so(tmp_path):
    assert check(write(tmp_path / "b", digest=False)).statement == "no digest published"


def test_a_build_of_the_first_era_has_no_metadata_to_compare(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "__init__.py").write_text("")
    assert check(tmp_path / "b").statement == "no digest published"


def test_metadata_other_than_the_one_judged_is_refused(tmp_path):
    build = write(tmp_path / "b")
    judged = metadata_of(build)
    about = json.loads((build / "metadata.json").read_text())
    for key, value in (("python-depends", ["einops"]), ("id", "_other"), ("backend", {"type": "cuda"})):
        (build / "metadata.json").write_text(json.dumps({**about, key: value}))
        with pytest.raises(Refused, match="not the one that this build was chosen by"):
            check(build, judged)
    (build / "metadata.json").write_text("{")
    with pytest.raises(Refused, match="not JSON"):
        check(build, judged)
    (build / "metadata.json").unlink()
    with pytest.raises(Refused, match=r"metadata\.json is missing"):
        check(build, judged)


def test_metadata_of_an_old_era_is_compared_in_what_it_does_say(tmp_path):
    build = write(tmp_path / "b", digest=False)
    (build / "metadata.json").write_text('{"version": 1, "python-depends": []}')
    judged = metadata_of(build)
    assert judged.synthesised
    check(build, judged)
    (build / "metadata.json").write_text('{"version": 2, "python-depends": []}')
    with pytest.raises(Refused, match="not the one"):
        check(build, judged)
