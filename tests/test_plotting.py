"""What figures tell beside the picture."""

from matplotlib.figure import Figure

from gudlib import plotting


def test_a_figure_in_numbers_is_a_text_that_a_page_folds(monkeypatch):
    shown = []
    monkeypatch.setattr(plotting, "display", shown.append)
    left, right = Figure().subplots(1, 2)
    left.plot([1, 2, 3], [4.0, -5.0, 6.5], label="a < b")
    left.set(title="heights", xlabel="place")
    right.imshow([[0.0, 1.0], [2.0, 3.0]])
    plotting.describe([left, right])
    assert repr(shown[0]).splitlines() == [
        "heights | x: place | y: -",
        "  a < b: n=3 first=4 last=6.5 min=-5 max=6.5",
        "untitled | x: - | y: -",
        "  image 2x2: mean=1.5 min=0 max=3",
    ]
    page = shown[0]._repr_html_()
    assert page.startswith("<details><summary>") and "a &lt; b: n=3" in page and "a < b" not in page
