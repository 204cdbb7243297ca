"""Many who ask at once, those who leave, and the end of the server."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time

import openai
import pytest

from mmagent.serve import wire
from mmagent.serve.pictures import Pictures
from tests.serve.serve_kit import ScriptedPolicy, ids_of, image_part, png, png_url, said, serving, wait_for

LONG = ids_of("a long answer, " * 40, "<|user|>")


def slow(**options) -> ScriptedPolicy:
    return ScriptedPolicy(LONG, step=1, pause=0.01, **options)


def begin(server, **fields) -> http.client.HTTPConnection:
    """A request whose answer nobody has read yet."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    body = json.dumps({"model": "tiny", "messages": said("Hello")} | fields)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    return connection


def leave(connection: http.client.HTTPConnection) -> None:
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_takes_the_request_along(stream):
    with serving(slow()) as server:
        connection = begin(server, stream=stream, n=3)
        wait_for(lambda: server.policy.open == 3)
        if stream:
            response = connection.getresponse()
            assert response.read(10)
        leave(connection)
        wait_for(lambda: server.policy.open == 0)
        assert server.policy.cancelled == 3
        wait_for(lambda: server.desk.idle)
        wait_for(lambda: server.desk.ledger.answers[499] == 1)


def test_who_takes_nothing_of_the_answer_is_cut_off(monkeypatch):
    monkeypatch.setattr(wire, "STALL_SECONDS", 0.3)
    endless = ScriptedPolicy(lambda prompt, limits: LONG[:-1] * 20, step=1)
    with serving(endless, context=1 << 20, buffer=4096) as server, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        body = json.dumps({"model": "tiny", "messages": said("Hello"), "stream": True, "n": 2})
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        sock.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
        wait_for(lambda: server.policy.open == 2)
        wait_for(lambda: server.policy.open == 0, 20)
        assert server.policy.cancelled == 2
        wait_for(lambda: server.desk.idle)


def test_beyond_the_line_people_are_sent_away():
    with serving(slow(), running=2, waiting=1) as server:
        waiting = [begin(server) for _ in range(3)]
        wait_for(lambda: server.desk.running + server.desk.waiting == 3)
        status, headers, data = server.raw("/v1/chat/completions", {"model": "tiny", "messages": said("Hello")})
        assert status == 429
        assert int(headers["retry-after"]) >= 1
        assert json.loads(data)["error"]["type"] == "rate_limit_error"
        status, health = server.ask("/health", None, "GET")
        assert (health["running"], health["queued"]) == (2, 1)
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="tiny", messages=said("Hello"))
        for connection in waiting:
            leave(connection)
        wait_for(lambda: server.desk.idle)
        server.policy.pause = 0.0
        assert server.chat()[0] == 200


@pytest.mark.parametrize("where", ["patches", "_from_file"])
def test_who_finds_the_memory_for_pictures_taken_is_sent_away_before_it_is_used(monkeypatch, tmp_path, where):
    """Hundreds in line would each hold their pictures before the first of them was counted."""
    (tmp_path / "a.png").write_bytes(png(1))
    url = png_url(1) if where == "patches" else (tmp_path / "a.png").as_uri()
    inside, go_on, work = [], threading.Event(), getattr(Pictures, where)

    def slow(self, *args):
        inside.append(args)
        assert go_on.wait(20)
        return work(self, *args)

    monkeypatch.setattr(Pictures, where, slow)
    asked = {"model": "tiny", "messages": said(image_part(url), "a")}
    with serving(ScriptedPolicy(ids_of("yes", "<|user|>")), files=tmp_path) as server:
        server.desk._patch_bytes = 1000  # one alone is taken all the same
        answers = []
        first = threading.Thread(target=lambda: answers.append(server.ask("/v1/chat/completions", asked)))
        first.start()
        wait_for(lambda: len(inside) == 1)
        try:
            status, answer = server.ask("/v1/chat/completions", asked)
            assert (status, answer["error"]["code"]) == (429, "busy")
            assert len(inside) == 1
        finally:
            server.desk._patch_bytes = 1 << 30
            go_on.set()
            first.join(20)
        assert [status for status, _ in answers] == [200]
        wait_for(lambda: server.desk.idle)
        assert server.desk._patches == 0


def test_a_request_has_its_time():
    with serving(slow(), seconds=0.3) as server:
        status, answer = server.chat()
        assert (status, answer["error"]["code"]) == (504, "timeout")
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match=r"not done within 0\.3 seconds"):
            list(client.chat.completions.create(model="tiny", messages=said("Hi"), stream=True))
        wait_for(lambda: server.policy.open == 0)


def test_a_silent_stream_sends_signs_of_life(monkeypatch):
    monkeypatch.setattr(wire, "SILENCE_SECONDS", 0.05)
    with serving(ScriptedPolicy(ids_of("yes", "<|user|>"), step=9, pause=0.5)) as server:
        _, _, data = server.raw("/v1/chat/completions", {"model": "tiny", "messages": said("Hi"), "stream": True})
        assert b"\n\n: waiting\n\n" in data
        assert data.endswith(b"data: [DONE]\n\n")


def test_a_policy_that_breaks_is_a_500_and_the_next_request_is_served():
    def script(prompt, limits):
        if b"break" in bytes(index for index in prompt.input_ids if index < 256) or "break" in text(prompt):
            raise RuntimeError("a secret of the machine")
        return ids_of("yes", "<|user|>")

    def text(prompt):
        from tests.serve.serve_kit import VOCAB

        return VOCAB.decode(prompt.input_ids)

    with serving(ScriptedPolicy(script)) as server:
        status, answer = server.chat(messages=said("break"))
        assert (status, answer["error"]["type"]) == (500, "server_error")
        assert "secret" not in json.dumps(answer)
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="its log says how"):
            list(client.chat.completions.create(model="tiny", messages=said("break"), stream=True))
        assert server.chat()[0] == 200
        assert server.desk.idle


def test_the_end_lets_what_runs_finish_and_takes_nothing_more():
    with serving(slow()) as server:
        results = []
        asking = threading.Thread(target=lambda: results.append(server.chat(max_tokens=60)))
        asking.start()
        wait_for(lambda: server.policy.open == 1)
        server.server._loop.call_soon_threadsafe(server.server.drain)
        wait_for(lambda: server.desk.closing)
        status, answer = server.chat()
        assert (status, answer["error"]["code"]) == (503, "closing")
        status, health = server.ask("/health", None, "GET")
        assert (status, health["status"]) == (503, "closing")
        asking.join(20)
        assert results[0][0] == 200
        assert results[0][1]["usage"]["completion_tokens"] == 60
        server.thread.join(10)
        assert not server.thread.is_alive()


@pytest.mark.parametrize("stream", [False, True])
def test_the_end_comes_even_so(stream):
    with serving(slow(), grace=0.2) as server:
        results = []
        body = {"model": "tiny", "messages": said("Hello"), "stream": stream}
        asking = threading.Thread(target=lambda: results.append(server.raw("/v1/chat/completions", body)))
        asking.start()
        wait_for(lambda: server.policy.open == 1)
        server.server._loop.call_soon_threadsafe(server.server.drain)
        server.thread.join(10)
        assert not server.thread.is_alive()
        asking.join(10)
        status, _, data = results[0]
        assert status == (200 if stream else 503)
        assert b"shutting down" in data
        assert server.policy.open == 0


@pytest.mark.slow
def test_hundreds_come_and_go_and_nothing_stays():
    """Whole and streamed answers, some left at once, some in the middle; afterwards all is as before."""
    import gc
    import random
    import tracemalloc

    draw = random.Random(0)
    with serving(ScriptedPolicy(LONG, step=5, pause=0.001), running=8, waiting=8) as server:

        def some(count: int, seed: int) -> None:
            own = random.Random(seed)
            for _ in range(count):
                connection = begin(server, stream=own.random() < 0.5, n=own.choice([1, 1, 3]), max_tokens=30)
                fate = own.random()
                if fate < 0.3:
                    time.sleep(own.random() * 0.02)
                    leave(connection)
                    continue
                response = connection.getresponse()
                assert response.status in (200, 429)
                if fate < 0.5:
                    response.read(20)
                    leave(connection)
                else:
                    response.read()
                    connection.close()

        def rush(count: int) -> None:
            threads = [threading.Thread(target=some, args=(count, draw.randrange(1 << 30))) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            wait_for(lambda: server.desk.idle and server.policy.open == 0)
            server.policy.prompts.clear()
            server.policy.limits.clear()
            gc.collect()

        tracemalloc.start()
        rush(20)
        before = tracemalloc.get_traced_memory()[0]
        rush(60)
        assert tracemalloc.get_traced_memory()[0] - before < 500_000
        tracemalloc.stop()
        assert server.chat()[0] == 200
        assert not server.server.server_state.tasks - {None}
