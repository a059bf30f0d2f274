// Draws window.PICTURE (made by pictures.py: a dashboard, and what Prometheus answered) with @grafana/ui.
// @grafana/ui exports no heatmap and no state timeline: those two are SVG in Grafana's colours, inside its panel frame.
import 'uplot/dist/uPlot.min.css';
import React from 'react';
import { createRoot } from 'react-dom/client';
import { createTheme, FieldType, getDisplayProcessor, getFieldDisplayName, getValueFormat, formattedValueToString,
  standardFieldConfigEditorRegistry, standardEditorsRegistry, ThemeContext } from '@grafana/data';
import { BarGauge, BigValue, GlobalStyles, InteractiveTable, PanelChrome, TimeSeries } from '@grafana/ui';

standardFieldConfigEditorRegistry.setInit(() => []);
standardEditorsRegistry.setInit(() => []);
const theme = createTheme({ colors: { mode: 'light' } });
const { title, panels, markers, from, to, width } = window.PICTURE;
const CELL = width / 24, ROW = 38, GAP = 8;
const range = { from: window.moment?.(from) ?? { valueOf: () => from }, to: { valueOf: () => to }, raw: { from: '', to: '' } };

function configOf(panel, name, ref) {
  const { defaults = {}, overrides = [] } = panel.fieldConfig ?? {};
  const config = { ...defaults, custom: { ...defaults.custom } };
  for (const { matcher, properties } of overrides) {
    const pattern = matcher.options;
    const isRegexp = matcher.id === 'byRegexp' && new RegExp(String(pattern).replace(/^\/|\/$/g, '')).test(name);
    if (!isRegexp && !(matcher.id === 'byName' && pattern === name) && !(matcher.id === 'byFrameRefID' && pattern === ref)) continue;
    for (const { id, value } of properties) {
      if (id.startsWith('custom.')) config.custom[id.slice(7)] = value; else config[id] = value;
    }
  }
  return config;
}

function fieldOf(panel, name, values, index = 0, type = FieldType.number, ref = undefined) {
  const field = { name, type, values, config: { ...configOf(panel, name, ref), displayName: name }, state: { seriesIndex: index } };
  field.display = getDisplayProcessor({ field, theme });
  return field;
}

const Empty = ({ panel }) => (
  <div style={{ display: 'grid', placeItems: 'center', height: '100%', color: theme.colors.text.secondary, textAlign: 'center' }}>
    {panel.fieldConfig?.defaults?.noValue ?? 'No data'}
  </div>
);

function Stat({ panel, width, height }) {
  const num = Math.max(panel.series.length, 1);
  const shown = panel.series.length ? panel.series : [{ name: '', values: [null] }];
  return shown.map(({ name, values }, i) => {
    const last = values.filter((v) => v !== null).at(-1) ?? null;
    const value = fieldOf(panel, name, values).display(last);
    if (last === null) value.text = panel.fieldConfig.defaults.noValue ?? value.text;
    const isText = panel.options.textMode === 'name';
    return <BigValue key={i} width={width} height={height / num} theme={theme} colorMode={panel.options.colorMode} graphMode="none"
      justifyMode="center" textMode={isText ? 'name' : 'value'} value={{ ...value, title: name }} hasLinks={false} />;
  });
}

function Bars({ panel, width, height }) {
  const num = panel.series.length, most = Math.max(...panel.series.map((s) => s.values.at(-1)));
  const each = Math.min(40, height / num);
  return panel.series.map(({ name, ref, values }, i) => {
    const field = fieldOf(panel, name, values, i, FieldType.number, ref);
    field.config = { ...field.config, min: 0, max: most };
    return <BarGauge key={name} width={width} height={each - 4} theme={theme} field={field.config} display={field.display} displayMode="basic"
      orientation="horizontal" valueDisplayMode="text" showUnfilled value={{ ...field.display(values.at(-1)), title: name }}
      text={{ titleSize: 12, valueSize: 13 }} itemSpacing={4} alignmentFactors={{ title: panel.series.map((s) => s.name).sort((a, b) => b.length - a.length)[0], text: '00000 ms', suffix: '' }} />;
  });
}

function Marks({ config }) {
  React.useLayoutEffect(() => {
    config.addHook('draw', (u) => {
      for (const { at, color } of markers) {
        const x = Math.round(u.valToPos(at, 'x', true));
        u.ctx.save();
        u.ctx.strokeStyle = u.ctx.fillStyle = color;
        u.ctx.setLineDash([4, 3]);
        u.ctx.beginPath();
        u.ctx.moveTo(x, u.bbox.top);
        u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
        u.ctx.stroke();
        u.ctx.beginPath();
        u.ctx.moveTo(x - 5, u.bbox.top + u.bbox.height + 7);
        u.ctx.lineTo(x + 5, u.bbox.top + u.bbox.height + 7);
        u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
        u.ctx.fill();
        u.ctx.restore();
      }
    });
  }, [config]);
  return null;
}

function Series({ panel, width, height }) {
  const frames = panel.series.map(({ name, ref, times, values }, i) => {
    const field = fieldOf(panel, name, values, i, FieldType.number, ref);
    field.config.custom = { axisPlacement: 'auto', drawStyle: 'line', lineWidth: 1, fillOpacity: 0, pointSize: 5, showPoints: 'never',
      hideFrom: { legend: false, tooltip: false, viz: false }, ...field.config.custom };
    return { refId: String(i), length: times.length, fields: [{ name: 'time', type: FieldType.time, values: times, config: {} }, field] };
  });
  return <TimeSeries width={width} height={height} frames={frames} timeRange={range} timeZone="utc" legend={panel.options.legend} options={panel.options}>
    {(config) => <Marks config={config} />}
  </TimeSeries>;
}

const timeLabel = (t) => new Date(t).toISOString().slice(11, 19);

function Axis({ x, y, span }) {
  return [0, 0.25, 0.5, 0.75, 1].map((part) => (
    <text key={part} x={x + part * span} y={y} fontSize="11" fill={theme.colors.text.secondary} textAnchor={['start', 'middle', 'middle', 'middle', 'end'][4 * part]}>
      {timeLabel(from + part * (to - from))}
    </text>
  ));
}

function States({ panel, width, height }) {
  const left = Math.min(width / 2, 12 + 6.4 * Math.max(...panel.series.map((s) => s.name.length))), span = width - left, each = (height - 20) / panel.series.length;
  return <svg width={width} height={height}>
    {panel.series.map(({ name, times, values }, i) => {
      const { display } = fieldOf(panel, name, values, i);
      const runs = [];
      values.forEach((value, j) => {
        const end = times[j + 1] ?? times[j] + (times[1] - times[0] || 1000);
        const last = runs.at(-1);
        if (value === null) return;
        if (last && last.value === value && last.end === times[j]) last.end = end; else runs.push({ value, start: times[j], end });
      });
      const at = (t) => left + (Math.min(t, to) - from) / (to - from) * span;
      return <g key={name}>
        <text x={left - 6} y={(i + 0.5) * each + 4} fontSize="12" textAnchor="end" fill={theme.colors.text.primary}>{name}</text>
        {runs.map(({ value, start, end }, j) => {
          const shown = display(value), text = formattedValueToString(shown), wide = at(end) - at(start);
          return <g key={j}>
            <rect x={at(start)} y={i * each + 2} width={wide} height={each - 4} fill={shown.color} fillOpacity="0.8" />
            {wide > 7 * text.length && <text x={at(start) + 4} y={(i + 0.5) * each + 4} fontSize="11" fill="#fff">{text}</text>}
          </g>;
        })}
      </g>;
    })}
    <Axis x={left} y={height - 3} span={span} />
  </svg>;
}

function Heat({ panel, width, height }) {
  const bound = (s) => (s.name === '+Inf' ? Infinity : Number(s.name));
  let rows = [...panel.series].sort((a, b) => bound(a) - bound(b));
  const most = Math.max(...rows.flatMap((s) => s.values.map(Number)));
  const isUsed = (s) => s.values.some((v) => v > 1e-9);
  rows = rows.slice(Math.max(rows.findIndex(isUsed) - 1, 0), rows.findLastIndex(isUsed) + 2);
  const left = 60, span = width - left, each = (height - 20) / rows.length, format = getValueFormat(panel.fieldConfig.defaults.unit);
  const colours = [[0, 32, 76], [87, 92, 109], [165, 155, 115], [255, 233, 69]];  // Cividis
  const colour = (v) => {
    const p = Math.sqrt(v / most) * 3, i = Math.min(Math.floor(p), 2);
    return `rgb(${colours[i].map((c, k) => Math.round(c + (colours[i + 1][k] - c) * (p - i)))})`;
  };
  return <svg width={width} height={height}>
    {rows.map((s, i) => {
      const y = height - 20 - (i + 1) * each, step = (s.times[1] - s.times[0] || 1000) / (to - from) * span;
      return <g key={s.name}>
        <text x={left - 6} y={y + 4} fontSize="11" textAnchor="end" fill={theme.colors.text.secondary}>
          {i === rows.length - 1 && y < 6 ? '' : bound(s) === Infinity ? '' : formattedValueToString(format(bound(s)))}
        </text>
        {s.values.map((v, j) => v > 1e-9 && <rect key={j} x={left + (s.times[j] - from) / (to - from) * span} y={y + 0.5} width={Math.max(step - 0.5, 1)} height={each - 1} fill={colour(v)} />)}
      </g>;
    })}
    <Axis x={left} y={height - 3} span={span} />
  </svg>;
}

function Rows({ panel }) {
  const columns = panel.table.map(({ field, name, values }) => {
    const isNumber = values.every((v) => v === null || typeof v === 'number');
    const { display } = fieldOf(panel, field, values, 0, isNumber ? FieldType.number : FieldType.string);
    const cell = ({ row }) => {
      const value = row.original[name];
      if (value === null || value === undefined) return '';
      const shown = display(value), isColoured = configOf(panel, field).custom?.cellOptions?.type?.startsWith('color');
      return <span style={isColoured ? { background: shown.color, color: '#fff', padding: '2px 8px' } : {}}>{isNumber ? formattedValueToString(shown) : shown.text}</span>;
    };
    return { id: name, header: name, cell };
  });
  const rows = panel.table[0].values.map((_, i) => Object.fromEntries([['id', String(i)], ...panel.table.map(({ name, values }) => [name, values[i]])]));
  return <div style={{ zoom: 0.85 }}><InteractiveTable columns={columns} data={rows} getRowId={(row) => row.id} /></div>;
}

const KINDS = { stat: Stat, timeseries: Series, bargauge: Bars, 'state-timeline': States, heatmap: Heat, table: Rows };

function Picture() {
  return panels.map((panel) => {
    const { x, y, w, h } = panel.gridPos;
    const box = { position: 'absolute', left: x * CELL + GAP, top: 44 + y * ROW, width: w * CELL - GAP, height: h * ROW - GAP };
    if (panel.type === 'row') return <div key={panel.id} style={{ ...box, ...theme.typography.h5, paddingTop: 6 }}>{panel.title}</div>;
    const Kind = KINDS[panel.type];
    const isEmpty = panel.table ? !panel.table.length : !panel.series.length && panel.type !== 'stat';
    return <div key={panel.id} style={box}>
      <PanelChrome title={panel.title} width={box.width} height={box.height} padding="sm">
        {(width, height) => (isEmpty ? <Empty panel={panel} /> : <Kind panel={panel} width={width} height={height} />)}
      </PanelChrome>
    </div>;
  });
}

function Key() {
  const names = [...new Map(markers.map(({ name, color }) => [name, color]))];
  if (!names.length) return null;
  const bottom = 44 + ROW * Math.max(...panels.map(({ gridPos: { y, h } }) => y + h));
  return <div style={{ position: 'absolute', left: GAP, top: bottom, ...theme.typography.bodySmall }}>
    Dashed: {names.map(([name, color]) => <span key={name} style={{ marginLeft: 12 }}><b style={{ color }}>┆ ▲</b> {name}</span>)}
  </div>;
}

class Guard extends React.Component {
  componentDidCatch(error) { document.title = 'FAILED ' + error; console.error(error); }
  render() { return this.props.children; }
}

createRoot(document.getElementById('root')).render(
  <ThemeContext.Provider value={theme}>
    <GlobalStyles />
    <Guard><div style={{ ...theme.typography.h3, padding: '10px 8px' }}>{title}</div><Picture /><Key /></Guard>
  </ThemeContext.Provider>,
);
