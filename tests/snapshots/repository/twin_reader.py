"""A slow, obvious reader of encrypted repositories, written from docs/format-repository.md alone.

It shares no code with what it checks: AES, CMAC and scrypt come from the program `openssl`, the
rest of GCM, SIV and HKDF is written out here.
"""

import base64
import hashlib
import hmac
import struct
import subprocess

import lz4.block
import msgpack

RECORD = struct.Struct(">4sBBBBQQ32s")
ENTRY = struct.Struct(">HIIIBB32s")
PATCH = struct.Struct(">HHIIIBBQ32s32s")
REFERENCE = struct.Struct(">IIIIIIQ32s")


def openssl(*arguments, data=b""):
    return subprocess.run(
        ["openssl", *arguments], input=data, capture_output=True, check=True
    ).stdout


def encrypt_blocks(key, blocks):
    return openssl("enc", "-aes-256-ecb", "-nopad", "-K", key.hex(), data=blocks)


def count_mode(key, first_block, data):
    return openssl("enc", "-aes-256-ctr", "-K", key.hex(), "-iv", first_block.hex(), data=data)


def scrypt(secret, salt, n, r, p):
    options = [f"hexpass:{secret.hex()}", f"hexsalt:{salt.hex()}", f"n:{n}", f"r:{r}", f"p:{p}"]
    flags = [word for option in options for word in ("-kdfopt", option)]
    return openssl("kdf", "-binary", "-keylen", "32", *flags, "SCRYPT")


def hkdf(secret, salt, info, length):
    prk, block, output = hmac.digest(salt, secret, "sha256"), b"", b""
    while len(output) < length:
        block = hmac.digest(prk, block + info + bytes([len(output) // 32 + 1]), "sha256")
        output += block
    return output[:length]


def gcm_open(key, nonce, sealed, associated):
    """NIST SP 800-38D, for nonces of 12 bytes."""
    ciphertext, tag = sealed[:-16], sealed[-16:]
    both = encrypt_blocks(key, bytes(16) + nonce + b"\0\0\0\1")
    factor, mask, total = int.from_bytes(both[:16]), int.from_bytes(both[16:]), 0
    padded = [part + bytes(-len(part) % 16) for part in (associated, ciphertext)]
    lengths = struct.pack(">QQ", 8 * len(associated), 8 * len(ciphertext))
    hashed = b"".join([*padded, lengths])
    for at in range(0, len(hashed), 16):
        multiplicand, product, shifted = total ^ int.from_bytes(hashed[at : at + 16]), 0, factor
        for bit in range(127, -1, -1):
            if multiplicand >> bit & 1:
                product ^= shifted
            shifted = shifted >> 1 ^ (0xE1 << 120 if shifted & 1 else 0)
        total = product
    assert (total ^ mask).to_bytes(16) == tag
    return count_mode(key, nonce + b"\0\0\0\2", ciphertext)


def cmac(key, data):
    options = ["-macopt", f"hexkey:{key.hex()}", "-cipher", "AES-256-CBC", "-in", "-", "-binary"]
    return openssl("mac", *options, "CMAC", data=data)


def siv_open(key, sealed, *associated):
    """RFC 5297, for texts of 16 bytes or more."""
    tag, mac_key = sealed[:16], key[:32]
    plain = count_mode(
        key[32:], (int.from_bytes(tag) & ~(1 << 63 | 1 << 31)).to_bytes(16), sealed[16:]
    )
    chain = int.from_bytes(cmac(mac_key, bytes(16)))
    for part in associated:
        chain = (chain << 1 & (1 << 128) - 1) ^ (0x87 if chain >> 127 else 0)
        chain ^= int.from_bytes(cmac(mac_key, part))
    end = (int.from_bytes(plain[-16:]) ^ chain).to_bytes(16)
    assert cmac(mac_key, plain[:-16] + end) == tag
    return plain


def read_record(data, kind):
    magic, found, version, codec, cipher, stored, plain, digest = RECORD.unpack_from(data)
    body = data[56:]
    assert (magic, found, version, cipher, stored) == (b"NBDR", kind, 1, 0, len(body))
    assert hashlib.sha256(data[:24] + body).digest() == digest
    if codec == 2:
        body = lz4.block.decompress(body, uncompressed_size=plain)
    return msgpack.unpackb(body, max_bin_len=1 << 30)


class TwinReader:
    """Reads ``objects``, what is in the bucket: a dictionary of bytes by key."""

    def __init__(self, objects, passphrase=None, key_file=None):
        self.objects = objects
        self.config = read_record(objects["config"], 1)
        self.id = self.config["repository"]
        self.master = None
        for key, data in objects.items():
            if key.startswith("keys/"):
                self.try_key(key, data, passphrase, key_file)
        assert self.master, "no key opens it"
        inner = read_record(self.open_object("config", self.config["sealed"]), 1)
        assert inner["repository"] == self.id
        assert inner["cipher"] == self.config["cipher"] == "aes-256-gcm"
        self.config = inner

    def try_key(self, key, data, passphrase, key_file):
        fields = read_record(data[:-32], 16)
        if fields["kind"] == "passphrase" and passphrase is not None:
            cost = [fields[name] for name in "nrp"]
            secret = scrypt(passphrase.encode(), fields["salt"], *cost)
        elif fields["kind"] == "key file" and key_file is not None:
            secret = bytes.fromhex(key_file)
        else:
            return
        info = b"nbdserve key " + fields["repository"] + key.encode()
        derived = hkdf(secret, fields["salt"], info, 64)
        if derived[:32] == fields["commitment"]:
            self.master = gcm_open(derived[32:], bytes(12), fields["wrapped"], b"")
            mac_key = self.derive("nbdserve keys", 32)
            assert data[-32:] == hmac.digest(mac_key, key.encode() + b"\0" + data[:-32], "sha256")

    def derive(self, info, length):
        return hkdf(self.master, self.id, info.encode(), length)

    def open_object(self, key, data):
        exact = key.startswith(("segments/", "pages/"))
        assert exact or len(data) % 16384 == 0 or len(data) in (1024, 2048, 4096, 8192)
        object_key = self.derive("nbdserve object " + key, 32)
        plain = b""
        for number in range(-(-len(data) // 16384)):
            frame = data[number * 16384 : (number + 1) * 16384]
            plain += gcm_open(object_key, frame[:12], frame[12:], struct.pack(">Q", number))
        length = int.from_bytes(plain[:8])
        content, filling = plain[8 : 8 + length], plain[8 + length :]
        assert len(content) == length
        assert not filling.strip(b"\0") and not (exact and filling)
        return content

    def open_name(self, text, *associated):
        sealed = base64.b32decode(text.upper() + "=" * (-len(text) % 8))
        plain = siv_open(self.derive("nbdserve names", 64), sealed, *associated)
        assert len(plain) % 32 == 0
        return plain.rstrip(b"\0").decode()

    def names(self):
        """(volume, snapshot, push) of every pointer, from the keys."""
        found = []
        for key in self.objects:
            if key.startswith("snapshots/"):
                _, volume_text, snapshot_text, push = key.split("/")
                volume = self.open_name(volume_text, b"volume")
                snapshot = self.open_name(snapshot_text, b"snapshot", volume.encode())
                pointer = self.open_object(
                    f"snapshots/{volume}/{snapshot}/{push}", self.objects[key]
                )
                assert read_record(pointer, 5)["volume"] == volume
                found.append((volume, snapshot, push))
        return sorted(found)

    def restore(self, push):
        """The content of the volume in the snapshot of ``push``."""
        key = f"outcomes/{push}"
        (root,) = read_record(self.open_object(key, self.objects[key]), 3)["roots"]
        volume = bytearray(root["size"])
        chunk_size, opened = self.config["chunk_size"], {}

        def get(key):
            if key not in opened:
                opened[key] = self.open_object(key, self.objects[key])
            return opened[key]

        for reference in REFERENCE.iter_unpack(root["pages"]):
            index, place, number, offset, length, _, _, digest = reference
            key = f"pages/{root['pushes'][16 * place : 16 * place + 16].hex()}/{number:08x}"
            record = get(key)[offset : offset + length]
            assert record[24:56] == digest
            page = read_record(record, 6)
            patches = {patch[0]: patch[1:] for patch in PATCH.iter_unpack(page.get("patches", b""))}

            def piece(pushes, place, number, offset, length, codec, size):
                push = pushes[16 * place : 16 * place + 16].hex()
                plain = get(f"segments/{push}/{number:08x}")[offset : offset + length]
                return lz4.block.decompress(plain, uncompressed_size=size) if codec == 2 else plain

            for chunk, entry in enumerate(ENTRY.iter_unpack(page["entries"])):
                place, number, offset, length, codec, cipher, digest = entry
                if length == 0:
                    continue
                assert cipher == 0
                at = (1024 * index + chunk) * chunk_size
                size = min(chunk_size, root["size"] - at)
                stored = place, number, offset, length, codec & 127, size
                plain = bytearray(piece(page["pushes"], *stored))
                if codec & 128:
                    *stored, cipher, mask, patch_digest, below = patches.pop(chunk)
                    assert cipher == 0
                    assert hashlib.sha256(plain).digest() == below
                    blocks = piece(page["pushes"], *stored, size)
                    hashed = struct.pack(">Q", mask) + blocks
                    assert hashlib.sha256(hashed).digest() == patch_digest
                    block = max(4096, chunk_size // 64)
                    for number in range(64):
                        if mask >> number & 1:
                            start = number * block
                            end = min(start + block, size)
                            plain[start:end], blocks = blocks[: end - start], blocks[end - start :]
                    assert not blocks
                assert hashlib.sha256(plain).digest() == digest
                volume[at : at + size] = plain
            assert not patches
        return bytes(volume)
