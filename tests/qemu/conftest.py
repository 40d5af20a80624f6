"""The Linux guest, built once."""

import os

import pytest

from tests.harness.linux_guest import build_linux_image


@pytest.fixture(scope="session")
def linux_image():
    image, why_not = build_linux_image()
    if image is None:
        required = "qemu" in os.environ.get("MIGRATE_TEST_REQUIRE", "").split(",")
        (pytest.fail if required else pytest.skip)(f"qemu: {why_not}")
    return image
