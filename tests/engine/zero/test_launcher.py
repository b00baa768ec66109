"""What starting the processes of a run says."""

from convclip.engine.zero import launcher


def test_a_build_is_announced_on_rank_0_where_it_will_happen(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launcher, "_extension_folder", lambda name: tmp_path)
    for rank, said in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        launcher._announce_build()
        assert ("compiling DeepSpeed's CPU extension" in (out := capsys.readouterr().out)) == said, out
    assert "30 to 60 s" in out and str(tmp_path) in out
    (tmp_path / "deepspeed_shm_comm.so").touch()
    launcher._announce_build()
    assert capsys.readouterr().out == ""
