"""What sweeps are made of, see experiments.sweep."""

from collections.abc import Mapping

from ml_collections import ConfigDict, config_dict


def sweep(paper: str, tables: Mapping[str, ConfigDict]) -> ConfigDict:
    """Tables of a `paper`, "s4nd" or "s6la", of runs with three seeds.

    All datasets are in `config.data_dir`, but HMDB-51, which has a folder of its own, `config.video_dir`.
    """
    config = ConfigDict({"paper": paper, "seeds": (0, 1, 2)})
    config.tables = ConfigDict(dict(tables), sort_keys=False)
    for options in config.tables.values():
        for row in options.rows.values():
            folder = "video_dir" if row.run.data.name == "hmdb51" else "data_dir"
            if folder not in config:
                config[folder] = config_dict.FieldReference("")
            row.run.data.dir = config.get_ref(folder)
    return config


def table(title: str, note: str, rows: Mapping[str, ConfigDict]) -> ConfigDict:
    """A table with these rows, of which the first one is what the others are compared with."""
    return ConfigDict({"title": title, "note": note, "rows": ConfigDict(dict(rows), sort_keys=False)})


def row(label: str, run: ConfigDict, weights_of: str = "") -> ConfigDict:
    """A row: a run, which may start from the weights of another one, TABLE/ROW."""
    return ConfigDict({"label": label, "run": run, "weights_of": weights_of})
