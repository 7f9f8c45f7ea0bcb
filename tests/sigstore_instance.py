"""A Sigstore of our own for the tests: certificate authority, certificate log, transparency log, and what a build signs with.

Everything that a verifier checks is really there and really signed: the certificate chain, the timestamp of the certificate
log inside the certificate, the entry of the transparency log with its inclusion proof, checkpoint and promise.
"""

import base64
import datetime as dt
import hashlib
import json
import struct

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier

ORIGIN = "log.test - 1"
FULCIO = "1.3.6.1.4.1.57264.1."
SCT_LIST = ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")


def b64(data):
    return base64.b64encode(data).decode()


def der(key):
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def sign(key, data):
    return key.sign(data, ec.ECDSA(hashes.SHA256()))


def utf8(text):
    """DER of a UTF8String."""
    data = text.encode()
    size = bytes([len(data)]) if len(data) < 128 else b"\x81" + bytes([len(data)])
    return b"\x0c" + size + data


class Sigstore:
    """`trusted_root()` is what a verifier trusts, `bundle(data, ...)` what `metadata.json.sigstore` holds."""

    def __init__(self):
        self.ca_key, self.log_key, self.rekor_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
        self.now = dt.datetime.now(dt.timezone.utc).replace(microsecond=0)
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test authority")])
        self.ca = (
            self._builder(name, name, self.ca_key, days=3650)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(key_cert_sign=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.ca_key.public_key()), critical=False)
            .sign(self.ca_key, hashes.SHA256())
        )

    def _builder(self, subject, issuer, key, days):
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.now - dt.timedelta(days=days / 2))
            .not_valid_after(self.now + dt.timedelta(days=days / 2))
        )

    def trusted_root(self):
        from sigstore.models import TrustedRoot
        from sigstore_models.trustroot import v1

        def log(key):
            return {
                "baseUrl": "https://log.test",
                "hashAlgorithm": "SHA2_256",
                "publicKey": {
                    "rawBytes": b64(der(key)),
                    "keyDetails": "PKIX_ECDSA_P256_SHA_256",
                    "validFor": {"start": "2020-01-01T00:00:00Z"},
                },
                "logId": {"keyId": b64(hashlib.sha256(der(key)).digest())},
            }

        authority = {
            "subject": {"organization": "test", "commonName": "test authority"},
            "uri": "https://authority.test",
            "certChain": {"certificates": [{"rawBytes": b64(self.ca.public_bytes(serialization.Encoding.DER))}]},
            "validFor": {"start": "2020-01-01T00:00:00Z"},
        }
        root = {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [log(self.rekor_key)],
            "certificateAuthorities": [authority],
            "ctlogs": [log(self.log_key)],
            "timestampAuthorities": [],
        }
        return TrustedRoot(v1.TrustedRoot.from_json(json.dumps(root)))

    def verifier(self):
        from sigstore.verify import Verifier

        return Verifier(trusted_root=self.trusted_root())

    def certificate(self, key, *, issuer, repository, workflow, issuer_v2=None):
        def build(sct=None):
            builder = self._builder(x509.Name([]), self.ca.subject, key, days=1)
            builder._serial_number = serial  # the same certificate with and without the timestamp in it
            builder = (
                builder.add_extension(_usage(digital_signature=True), critical=True)
                .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
                .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
                .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.ca_key.public_key()), critical=False)
                .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(workflow)]), critical=True)
                .add_extension(x509.UnrecognizedExtension(ObjectIdentifier(FULCIO + "1"), issuer.encode()), critical=False)
            )
            for number, text in ((8, issuer_v2 or issuer), (9, workflow), (12, repository)):
                extension = x509.UnrecognizedExtension(ObjectIdentifier(FULCIO + str(number)), utf8(text))
                builder = builder.add_extension(extension, critical=False)
            if sct is not None:
                builder = builder.add_extension(x509.UnrecognizedExtension(SCT_LIST, sct), critical=False)
            return builder.sign(self.ca_key, hashes.SHA256())

        serial = x509.random_serial_number()
        tbs = build().tbs_certificate_bytes
        at = int(self.now.timestamp() * 1000)
        signed = struct.pack("!BBQH", 0, 0, at, 1) + hashlib.sha256(der(self.ca_key)).digest()
        signed += len(tbs).to_bytes(3, "big") + tbs + b"\0\0"
        signature = sign(self.log_key, signed)
        sct = b"\0" + hashlib.sha256(der(self.log_key)).digest() + struct.pack("!QH", at, 0)
        sct += b"\x04\x03" + len(signature).to_bytes(2, "big") + signature
        listed = len(sct).to_bytes(2, "big") + sct
        listed = len(listed).to_bytes(2, "big") + listed
        return build(b"\x04" + (bytes([len(listed)]) if len(listed) < 128 else b"\x81" + bytes([len(listed)])) + listed)

    def bundle(self, data, **identity):
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self.certificate(key, **identity)
        signature = sign(key, data)
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        body = json.dumps(
            {
                "apiVersion": "0.0.1",
                "kind": "hashedrekord",
                "spec": {
                    "data": {"hash": {"algorithm": "sha256", "value": hashlib.sha256(data).hexdigest()}},
                    "signature": {"content": b64(signature), "publicKey": {"content": b64(pem)}},
                },
            },
            separators=(",", ":"),
        ).encode()
        log_id = hashlib.sha256(der(self.rekor_key)).digest()
        at = int(self.now.timestamp())
        promised = {"body": b64(body), "integratedTime": at, "logID": log_id.hex(), "logIndex": 0}
        promise = sign(self.rekor_key, json.dumps(promised, separators=(",", ":"), sort_keys=True).encode())
        root = hashlib.sha256(b"\0" + body).digest()
        note = f"{ORIGIN}\n1\n{b64(root)}\n"
        checkpoint = f"{note}\n\u2014 log.test {b64(log_id[:4] + sign(self.rekor_key, note.encode()))}\n"
        entry = {
            "logIndex": "0",
            "logId": {"keyId": b64(log_id)},
            "kindVersion": {"kind": "hashedrekord", "version": "0.0.1"},
            "integratedTime": str(at),
            "inclusionPromise": {"signedEntryTimestamp": b64(promise)},
            "inclusionProof": {
                "logIndex": "0",
                "rootHash": b64(root),
                "treeSize": "1",
                "hashes": [],
                "checkpoint": {"envelope": checkpoint},
            },
            "canonicalizedBody": b64(body),
        }
        return json.dumps(
            {
                "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
                "verificationMaterial": {
                    "certificate": {"rawBytes": b64(certificate.public_bytes(serialization.Encoding.DER))},
                    "tlogEntries": [entry],
                },
                "messageSignature": {
                    "messageDigest": {"algorithm": "SHA2_256", "digest": b64(hashlib.sha256(data).digest())},
                    "signature": b64(signature),
                },
            }
        )


def _usage(**which):
    names = [
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    ]
    return x509.KeyUsage(**{name: which.get(name, False) for name in names})
