"""The page's style sheet: system fonts, dark text on white or light on dark as the reader's system has it, white paper.

Text keeps a contrast of 4.5 at least (WCAG AA) in both; figures take their colours from hylo.report.drawing.FIGURE_CSS.
"""

STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --soft: #57606a; --page: #ffffff; --line: #e4e8ec; --rule: #c9d1d9;
  --card: #d8dee4; --mark: #0072b2; --good: #00507e; --good-page: #e3f1fb; --good-line: #7db8dc; --bad: #9c3f00;
  --bad-page: #fdebe0; --bad-line: #e2a581; --code: #f3f5f7; }
@media screen and (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --soft: #a8b1bc; --page: #0d1117; --line: #21272e; --rule: #3d444d; --card: #2d343c;
    --mark: #3a9bd9; --good: #9fd3f5; --good-page: #0f2a3d; --good-line: #2f6d94; --bad: #ffb488; --bad-page: #3a1e0d;
    --bad-line: #8f5129; --code: #1b2128; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, "Liberation Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 21px; margin: 0 0 12px; }
h3 { font-size: 15px; margin: 0 0 6px; overflow-wrap: anywhere; }
header p { margin: 0; color: var(--soft); display: flex; flex-wrap: wrap; align-items: center; gap: 4px 10px; }
header b { color: var(--text); font-weight: 600; margin: 0 4px; }
header b:first-child { margin-left: 0; }
section { margin-top: 44px; }
section p { margin: 0 0 10px; overflow-wrap: anywhere; }
p.lead { font-size: 17px; }
ul { margin: 0 0 14px; padding-left: 20px; font-size: 14.5px; }
li { margin: 2px 0; overflow-wrap: anywhere; }
p.note { color: var(--soft); font-size: 14px; }
.scroll + p, .tables + p { margin-top: 12px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 14px; margin: 26px 0 0; }
.card { border: 1px solid var(--card); border-top: 3px solid var(--mark); border-radius: 6px; padding: 12px 14px 14px; }
.card dt { color: var(--soft); font-size: 13px; font-weight: 600; }
.card dd { margin: 2px 0 0; font-size: 28px; font-weight: 650; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card dd.detail { font-size: 13px; font-weight: 400; color: var(--soft); line-height: 1.4; white-space: pre-line;
  overflow-wrap: anywhere; }
.badge { border-radius: 999px; padding: 2px 12px; font-size: 14px; font-weight: 600; text-decoration: none; }
.badge.pass { background: var(--good-page); color: var(--good); border: 1px solid var(--good-line); }
.badge.fail { background: var(--bad-page); color: var(--bad); border: 1px solid var(--bad-line); }
span.pass { color: var(--good); font-weight: 600; white-space: nowrap; }
span.fail { color: var(--bad); font-weight: 700; white-space: nowrap; }
.quoted { font-style: italic; color: var(--soft); }
figure { margin: 0 0 20px; }
figure svg { display: block; width: 100%; min-width: 640px; max-width: 1072px; height: auto; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Liberation Sans",
  sans-serif !important; }
figcaption { color: var(--soft); font-size: 14px; margin-top: 8px; }
figure + .scroll, .scroll + .scroll, figure + p, figure + figure { margin-top: 20px; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: baseline; }
th { font-weight: 600; color: var(--soft); border-bottom: 2px solid var(--rule); white-space: nowrap; }
.path, td code { overflow-wrap: anywhere; }
.n, code.hash { white-space: nowrap; overflow-wrap: normal; }
.n { text-align: right; }
td:first-child { white-space: nowrap; }
td:last-child, th:last-child { padding-right: 0; }
small { color: var(--soft); font-size: 12px; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; background: var(--code);
  border-radius: 4px; padding: 1px 5px; overflow-wrap: anywhere; white-space: pre-wrap; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 7px; }
.tables { display: flex; flex-wrap: wrap; gap: 28px 48px; }
.tables > div { max-width: 100%; }
section > .tables + .tables, section > .scroll + .tables, .tables + figure, .scroll + figure, p + figure,
  section > h3:not(:first-of-type), .scroll + h3 { margin-top: 26px; }
@media print {
  :root { color-scheme: light; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  section { margin-top: 24px; }
  figure, .card, .tables > div, section > .scroll, tr, h2, h3 { break-inside: avoid; }
  h2, h3, thead { break-after: avoid; }
  table { font-size: 9pt; }
  th, td { padding: 3px 10px 3px 0; }
  .swatch, .card, .badge, svg { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  .scroll { overflow: visible; }
  figure svg { min-width: 0; }
}
"""
