"""`vitds bench backbone`: the ways it sets beside each other."""

from __future__ import annotations

import json

from vitds.bench.backbone import bench_backbone

SMALL = ("backbone.options={channels: [8, 8, 8, 8]}", "views.crop_px=32")


def test_each_way_has_its_time_and_its_ratio_to_the_first(capsys) -> None:
    rows = bench_backbone(set=SMALL, images=4, rounds=1, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"rows": rows}
    names = [row["name"] for row in rows]
    assert names[:3] == ["as timm makes it", "freed memory kept", "channels last"]
    assert names[3:] in ([], ["bf16"])
    assert rows[0]["ratio"] == 1 and all(row["ms"] > 0 for row in rows)
