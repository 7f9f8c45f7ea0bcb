"""The bill of materials: complete, by the rules of CycloneDX 1.6, and the same every time."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from kernelswap.sbom import bill
from kernelswap.types import (
    Artifact,
    Candidate,
    Choice,
    Digest,
    Evidence,
    Implementation,
    Kept,
    Metadata,
    Requirement,
    Row,
    Site,
    Swap,
)


def sha(text):
    return hashlib.sha256(text.encode()).digest()


def artifact(name="org/norm", *, source="hub", license="MIT", depends=(), **metadata):  # noqa: A002  # metadata's own word
    digest = Digest(
        "sha256", (("layers.py", base64.b64encode(sha("b")).decode()), ("__init__.py", base64.b64encode(sha("a")).decode()))
    )
    about = Metadata(name.rpartition("/")[2], "_norm_1", 1, license, "cpu", digest=digest, **metadata)
    candidate = Candidate(Requirement(name, version=1), source, name, "c" * 40, "torch-cpu")
    return Artifact(candidate, Path("unused"), sha(name).hex(), about, (Evidence("publisher", "org is trusted"),), tuple(depends))


def choice(origin, layer="RMSNorm"):
    return Choice(Implementation(layer, "module", lambda self: None, True, True, origin) if origin else None)


def swap(path, inference, training=None):
    site = Site(path, "module", "RMSNorm", "m.RMSNorm", "cpu", "torch.float32", False, Row("RMSNorm"))
    return Swap(site, choice(inference), choice(training))


def check(found):
    """What the schema requires of the parts that are used here."""
    assert found["bomFormat"] == "CycloneDX"
    assert found["specVersion"] == "1.6"
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", found["serialNumber"])
    assert isinstance(found["version"], int)
    refs = [found["metadata"]["component"]["bom-ref"], *(c["bom-ref"] for c in found["components"])]
    assert len(refs) == len(set(refs))
    assert [d["ref"] for d in found["dependencies"]] == refs
    assert {ref for d in found["dependencies"] for ref in d["dependsOn"]} <= set(refs)
    for component in [*found["components"], *(f for c in found["components"] for f in c.get("components", ()))]:
        assert component["type"] in {"library", "file"}
        assert component["name"]
        for one in component["hashes"]:
            assert re.fullmatch({"SHA-256": "[0-9a-f]{64}", "SHA-512": "[0-9a-f]{128}"}[one["alg"]], one["content"])
        assert all(set(p) == {"name", "value"} for p in component.get("properties", ()))
    return found


def test_every_kernel_that_serves_is_a_component_with_files_licence_evidence_and_places():
    norm = artifact()
    found = check(bill([swap("b.norm", norm), swap("a.norm", norm, norm)], model="org/model"))
    (component,) = found["components"]
    assert (component["group"], component["name"], component["version"]) == ("org", "norm", "c" * 40)
    assert component["hashes"] == [{"alg": "SHA-256", "content": norm.digest}]
    assert component["licenses"] == [{"license": {"id": "MIT"}}]
    files = {f["name"]: f["hashes"][0]["content"] for f in component["components"]}
    assert files == {"__init__.py": sha("a").hex(), "layers.py": sha("b").hex()}
    assert component["evidence"]["occurrences"] == [
        {"location": "a.norm", "symbol": "RMSNorm", "additionalContext": "inference and training"},
        {"location": "b.norm", "symbol": "RMSNorm", "additionalContext": "inference"},
    ]
    assert {"name": "kernelswap:evidence:publisher", "value": "org is trusted"} in component["properties"]
    assert found["metadata"]["component"]["name"] == "org/model"


def test_what_serves_nothing_is_not_in_it():
    site = swap("a", artifact()).site
    assert check(bill([Kept(site, "slower"), swap("a", None)]))["components"] == []


def test_what_a_kernel_depends_on_is_in_it_once():
    below = artifact("org/below")
    left, right = artifact("org/left", depends=[below]), artifact("org/right", depends=[below])
    found = check(bill([swap("a", left), swap("b", None, right)]))
    assert sorted(c["name"] for c in found["components"]) == ["below", "left", "right"]
    depends = {d["ref"]: d["dependsOn"] for d in found["dependencies"]}
    assert depends[f"kernel:{left.digest}"] == [f"kernel:{below.digest}"]
    assert sorted(depends["model"]) == sorted(f"kernel:{a.digest}" for a in (left, right))


@pytest.mark.parametrize(
    ("license", "expected"),
    [
        ("apache-2.0", [{"license": {"id": "Apache-2.0"}}]),
        ("Our own terms", [{"license": {"name": "Our own terms"}}]),
    ],
)
def test_a_licence_is_spelt_as_spdx_spells_it_else_named(license, expected):  # noqa: A002  # metadata's own word
    assert check(bill([swap("a", artifact(license=license))]))["components"][0]["licenses"] == expected


def test_a_licence_that_was_made_up_is_not_stated():
    norm = artifact(synthesised=("license",))
    assert "licenses" not in check(bill([swap("a", norm)]))["components"][0]


def test_only_addresses_are_referred_to():
    norm = artifact(source="hub", upstream="https://example.org/up")
    norm = replace(norm, metadata=replace(norm.metadata, source="javascript:alert(1)"))
    assert check(bill([swap("a", norm)]))["components"][0]["externalReferences"] == [
        {"type": "website", "url": "https://example.org/up"}
    ]


def test_equal_outcomes_give_equal_bytes_and_other_ones_another_serial_number():
    one, two = artifact("org/one"), artifact("org/two")
    outcomes = [swap("a", one), swap("b", two)]
    first, second = (json.dumps(bill(o)) for o in (outcomes, list(reversed(outcomes))))
    assert first == second
    assert bill(outcomes)["serialNumber"] != bill([swap("a", one)])["serialNumber"]
    assert bill(outcomes, time="2026-01-31T12:00:00Z")["metadata"]["timestamp"] == "2026-01-31T12:00:00Z"
