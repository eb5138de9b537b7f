"""The client of GitHub's API, against a GitHub that answers in pages and sometimes with a 502."""
from collections.abc import Iterator

import pytest

from madewithml.config import UserError
from madewithml.github_api import MARKER, GitHubClient, find_comment, upsert_comment

from ..fake_github import BOT, FakeGitHub, fake_github

COMMENTS = [("eve", MARKER), (BOT, f"quotes {MARKER}"), ("bob", "LGTM")]


@pytest.fixture
def github() -> Iterator[FakeGitHub]:
    with fake_github() as github:
        github.tokens["t"] = {"pull-requests": "write"}
        github.comments = [{"id": 1000 + i, "pull": 7, "user": {"login": login}, "body": body}
                           for i, (login, body) in enumerate(COMMENTS)]
        yield github


@pytest.mark.parametrize("fault", ["failing", "lossy"])
def test_one_comment_is_kept_up_to_date(fault: str, github: FakeGitHub) -> None:
    """A 502 makes no second comment, whether or not the request took effect."""
    github.failing, github.lossy = set(), set()
    setattr(github, fault, {"GET", "POST", "PATCH"})
    api = GitHubClient("t", "team/classifier", github.url, retry_delay_s=0.01)
    for body in (f"{MARKER} one", f"{MARKER} two"):
        assert upsert_comment(api, 7, body) == "https://github.example/team/classifier/pull/7"
    assert [(comment["user"]["login"], comment["body"]) for comment in github.comments] == [
        *COMMENTS, (BOT, f"{MARKER} two")]
    assert not getattr(github, fault), "a fault did not occur"


@pytest.mark.parametrize(("token", "status"), [("other", 401), ("reader", 403)])
def test_missing_permission_is_reported(token: str, status: int, github: FakeGitHub) -> None:
    github.tokens["reader"] = {"pull-requests": "read"}
    client = GitHubClient(token, "team/classifier", github.url, retry_delay_s=0.01)
    with pytest.raises(UserError, match=f"{status} Client Error"):
        upsert_comment(client, 7, MARKER)
    assert len(github.comments) == len(COMMENTS)


def test_unreachable_server_is_reported() -> None:
    api = GitHubClient("t", "team/classifier", "http://127.0.0.1:9", retry_delay_s=0)
    with pytest.raises(UserError, match="GitHub: GET issues/7/comments"):
        find_comment(api, 7)
