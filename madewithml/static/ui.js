const form = document.querySelector('form')
const bars = document.querySelector('#bars')
const note = document.querySelector('#note')
const MAX_BARS = 10

function element(className, text = '') {
  const span = document.createElement('span')
  span.className = className
  span.textContent = text
  return span
}

function probabilityBar(label, probability, isBest) {
  const row = document.createElement('div')
  const track = element('track')
  const bar = element('bar')
  bar.style.width = `${100 * probability}%`
  track.append(bar)
  row.className = isBest ? 'row best' : 'row'
  row.append(element('label', label), track, element('share', `${(100 * probability).toFixed(1)} %`))
  return row
}

function remainder(ranked) {
  const row = document.createElement('div')
  const share = ranked.reduce((sum, [, probability]) => sum + probability, 0)
  row.className = 'more'
  row.textContent = `${ranked.length} more, together ${(100 * share).toFixed(1)} %`
  return row
}

function show({results, version, run_id}) {
  const {prediction, probabilities} = results[0]
  // An object lists names that look like numbers first, whatever their order in the response.
  const ranked = Object.entries(probabilities).sort(([, a], [, b]) => b - a)
  const rows = ranked.slice(0, MAX_BARS)
    .map(([label, probability]) => probabilityBar(label, probability, label === prediction))
  if (ranked.length > MAX_BARS) rows.push(remainder(ranked.slice(MAX_BARS)))
  bars.replaceChildren(...rows)
  const model = version ? `version ${version}` : `run ${run_id}`
  const isFallback = !(probabilities[prediction] >= ranked[0][1])
  const reason = isFallback ? ' No class reaches the minimum probability.' : ''
  note.textContent = `${prediction}, predicted by ${model}.${reason}`
}

function fail(message) {
  bars.replaceChildren()
  note.textContent = message
}

form.addEventListener('submit', async event => {
  event.preventDefault()
  note.textContent = '…'
  try {
    const response = await fetch('predict/', {
      method: 'POST',
      headers: {'content-type': 'application/json'},
      body: JSON.stringify(Object.fromEntries(new FormData(form))),
    })
    const body = await response.json()
    if (response.ok) show(body)
    else fail(body.detail)
  } catch {
    fail('The service cannot be reached.')
  }
})
