"""The page's style sheet. Colours are variables, once for light and once for dark; those that are mixed by opacity
are bare RGB triples. Ink on the strongest shade keeps a contrast above 4.5 in both."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --card: #ffffff; --ink: #1c2126; --soft: #59626c; --line: #e0ddd5;
  --s0: #0a6c8f; --s1: #b0500c; --s2: #6a4fa3; --s3: #2c7a4b;
  --less: 214 74 60; --more: 47 118 200; --amount: 222 152 20; --shade: .62;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1c2024; --ink: #e8e6e1; --soft: #a3abb3; --line: #343a40;
    --s0: #5dbce0; --s1: #eda05f; --s2: #b7a0ee; --s3: #7acb97;
    --less: 196 66 54; --more: 52 116 205; --amount: 168 112 6; --shade: .78;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums; print-color-adjust: exact; -webkit-print-color-adjust: exact;
}
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: clamp(1.6rem, 1.1rem + 2vw, 2.3rem); line-height: 1.15; letter-spacing: -.02em; margin: 0 0 14px;
  text-wrap: balance; }
h2 { font-size: 1.25rem; letter-spacing: -.01em; margin: 0 0 10px; }
h2 + .note { margin-top: -6px; }
h3 { font-size: .95rem; margin: 0; }
.eyebrow { color: var(--soft); font-size: .8rem; letter-spacing: .06em; margin: 0 0 10px; }
.lead { font-size: 1.15rem; line-height: 1.5; max-width: 46em; margin: 0 0 26px; }
.note { color: var(--soft); max-width: 50em; margin: 0 0 16px; }
section { margin-top: 46px; }

dl.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px 24px; margin: 0;
  border-top: 1px solid var(--line); padding-top: 16px; }
dl.facts div { min-width: 0; }
dl.facts dt { color: var(--soft); font-size: .8rem; }
dl.facts dd { margin: 0; overflow-wrap: anywhere; }

.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 9px 16px; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--soft); font-weight: 500; font-size: .85rem; }
th:first-child { text-align: left; font-weight: 600; }

.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 16px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 14px 16px 10px; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 2px 14px; margin-bottom: 6px; }
.names { display: flex; flex-wrap: wrap; gap: 2px 12px; color: var(--soft); font-size: .85rem; }
.names i { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 5px;
  background: currentColor; }
.c0 { color: var(--s0); } .c1 { color: var(--s1); } .c2 { color: var(--s2); } .c3 { color: var(--s3); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; }
svg .rule { stroke: var(--line); } svg .limit { stroke: var(--ink); stroke-dasharray: 5 4; }
svg .curve { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
svg .box { fill: currentColor; } svg .point { fill: currentColor; opacity: .45; }
svg .dot { fill: currentColor; stroke: var(--card); stroke-width: 1.5; }

.bar { display: grid; grid-template-columns: 5.5em 1fr 6.5em; align-items: center; gap: 10px; margin: 7px 0;
  font-size: .95rem; }
.bar b { font-weight: 400; text-align: right; }
.track i { display: block; height: 18px; min-width: 2px; width: var(--w); border-radius: 0 4px 4px 0;
  background: currentColor; }

.keys { display: flex; flex-wrap: wrap; gap: 8px 28px; margin: 0 0 16px; font-size: .9rem; color: var(--soft); }
.keys > span { display: inline-flex; align-items: center; gap: 8px; }
.ramp { width: 92px; height: 14px; border-radius: 3px; border: 1px solid var(--line); }
.ramp.one { background: linear-gradient(90deg, transparent, rgb(var(--amount) / var(--shade))); }
.ramp.two { background:
  linear-gradient(90deg, rgb(var(--less) / var(--shade)), transparent, rgb(var(--more) / var(--shade))); }
.example { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 16px 18px 18px;
  margin-top: 16px; }
.prompt { color: var(--soft); margin: 4px 0 14px; white-space: pre-wrap; overflow-wrap: anywhere; max-width: 60em;
  max-height: 12em; overflow-y: auto; }
.responses { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 18px 32px; }
.response { min-width: 0; }
.response header { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 12px;
  border-bottom: 1px solid var(--line); padding-bottom: 4px; }
.response header span, .by { color: var(--soft); font-size: .85rem; }
.by { margin: 10px 0 1px; }
.text { margin: 0; line-height: 1.75; white-space: pre-wrap; overflow-wrap: anywhere; }
.notes { margin: 10px 0 0; padding-left: 1.2em; color: var(--soft); font-size: .85rem; }
.t { padding: 2px 0; border-radius: 2px; text-decoration-thickness: 2px; text-underline-offset: 4px;
  text-decoration-skip-ink: none; }
.s { border-left: 2px solid var(--soft); padding-left: 2px; margin-left: 1px; }
.t:hover { outline: 1.5px solid var(--ink); }
.a { background: rgb(var(--amount) / calc(var(--v) * var(--shade))); }
.n { background: rgb(var(--less) / calc(var(--v) * var(--shade))); }
.p { background: rgb(var(--more) / calc(var(--v) * var(--shade))); }
.k { text-decoration-line: underline; }
.k0 { text-decoration-style: solid; text-decoration-color: var(--s2); }
.k1 { text-decoration-style: dashed; text-decoration-color: var(--s3); }
.k2 { text-decoration-style: double; text-decoration-color: var(--s1); }
.k3 { text-decoration-style: dotted; text-decoration-color: var(--s0); }
.k4 { text-decoration-style: wavy; text-decoration-color: var(--s2); }
.k5 { text-decoration-style: wavy; text-decoration-color: var(--s3); }
.keys .t { color: var(--ink); padding-bottom: 4px; }
@media (max-width: 600px) {
  main { padding: 26px 16px 48px; }
  svg text { font-size: 15px; }
  th, td { padding: 8px 10px; }
  thead th, tbody th { white-space: normal; }
  dl.facts { grid-template-columns: 1fr 1fr; }
}
"""
