"""A SPANK plugin that knows pyxis's options and runs no container: it writes down what srun was given."""

from __future__ import annotations

import subprocess
from pathlib import Path

LOG = "PYXIS_STUB_LOG"  # environment variable: where to

SOURCE = r"""
#include <stdio.h>
#include <stdlib.h>
#include <slurm/spank.h>

SPANK_PLUGIN(pyxis_stub, 1);

static const char *names[] = {"container-image", "container-mounts", "container-workdir"};

static int note(int which, const char *value, int remote) {
    const char *path = getenv("%(log)s");
    if (!remote && path) {
        FILE *file = fopen(path, "a");
        fprintf(file, "%%s=%%s\n", names[which], value);
        fclose(file);
    }
    return 0;
}

int slurm_spank_init(spank_t spank, int argc, char **argv) {
    for (int i = 0; i < 3; i++) {
        struct spank_option option = {(char *)names[i], "VALUE", "as pyxis", 1, i, note};
        if (spank_option_register(spank, &option) != ESPANK_SUCCESS) return -1;
    }
    return 0;
}
"""


def build(folder: Path) -> str:
    """Compile it; the line of plugstack.conf that loads it."""
    source, plugin = folder / "pyxis_stub.c", folder / "pyxis_stub.so"
    source.write_text(SOURCE % {"log": LOG})
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(plugin), str(source)], check=True, capture_output=True)
    return f"required {plugin}\n"
