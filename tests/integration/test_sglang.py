"""The client against a real SGLang server on this machine's CPU."""

import urllib.request


def test_x(sglang_servers, tmp_path):
    from tests.helpers.models import save_qwen2

    server = sglang_servers.shared(save_qwen2(tmp_path / "m"))
    print(urllib.request.urlopen(server.url + "/model_info").read())
    print(server.command.as_shell())
