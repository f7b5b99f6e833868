"""The page's style sheet: system fonts, dark text on white, also on paper."""

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1f2328; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, "Liberation Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 21px; margin: 0 0 12px; }
h3 { font-size: 15px; margin: 0 0 6px; }
header p { margin: 0; color: #57606a; display: flex; flex-wrap: wrap; align-items: center; gap: 4px 10px; }
header b { color: #1f2328; font-weight: 600; margin: 0 4px; }
header b:first-child { margin-left: 0; }
section { margin-top: 44px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; margin: 26px 0 0; }
.card { border: 1px solid #d8dee4; border-top: 3px solid #0072B2; border-radius: 6px; padding: 12px 14px 14px; }
.card dt { color: #57606a; font-size: 13px; font-weight: 600; }
.card dd { margin: 2px 0 0; font-size: 28px; font-weight: 650; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card dd.detail { font-size: 13px; font-weight: 400; color: #57606a; line-height: 1.4; white-space: pre-line; }
.badge { border-radius: 999px; padding: 2px 12px; font-size: 14px; font-weight: 600; text-decoration: none; }
.badge.pass { background: #e3f1fb; color: #00507e; border: 1px solid #7db8dc; }
.badge.fail { background: #fdebe0; color: #8f3c00; border: 1px solid #e2a581; }
span.pass { color: #00507e; font-weight: 600; white-space: nowrap; }
span.fail { color: #a84300; font-weight: 700; white-space: nowrap; }
figure { margin: 0; }
figure svg { display: block; width: 100%; min-width: 640px; height: auto; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Liberation Sans",
  sans-serif !important; }
figcaption { color: #57606a; font-size: 14px; margin-top: 8px; max-width: 86ch; }
figure + .scroll, figure + p { margin-top: 20px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid #e4e8ec; vertical-align: baseline; }
th { font-weight: 600; color: #57606a; border-bottom: 2px solid #c9d1d9; white-space: nowrap; }
.n { text-align: right; white-space: nowrap; }
td:first-child { white-space: nowrap; }
td:last-child, th:last-child { padding-right: 0; }
small { color: #6b7480; font-size: 12px; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 7px; }
.tables { display: flex; flex-wrap: wrap; gap: 28px 48px; }
@media print {
  body { font-size: 11pt; }
  main { max-width: none; padding: 0; }
  section { margin-top: 24px; }
  figure, .cards, table, h2, h3 { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .swatch, .card, .badge, svg { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  .scroll { overflow: visible; }
  figure svg { min-width: 0; }
}
"""
