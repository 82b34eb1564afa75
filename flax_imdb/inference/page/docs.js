// Shows openapi.json, as textContent alone.

const METHODS = ['get', 'post'];

function add(parent, name, text = '') {
  const element = document.createElement(name);
  element.textContent = text;
  parent.append(element);
  return element;
}

function addList(parent, title, entries) {
  add(parent, 'h3', title);
  const list = add(parent, 'dl');
  for (const [name, text] of entries) {
    add(add(list, 'dt'), 'code', name);
    add(list, 'dd', text);
  }
}

function addProperties(parent, title, properties) {
  addList(parent, title, Object.entries(properties).map(
    ([name, property]) => [name, property.description]));
}

function addOperation(path, method, operation, schemas) {
  const section = add(document.getElementById('operations'), 'section');
  section.className = 'operation';
  add(add(section, 'h2'), 'code', `${method.toUpperCase()} ${path}`);
  add(section, 'p', operation.summary);
  const named = ({$ref}) => $ref ? schemas[$ref.split('/').at(-1)] : {};
  const url = new URL(path.slice(1), document.baseURI);
  const sent = operation.requestBody?.content['application/json'];
  if (sent) addProperties(section, 'Send', named(sent.schema).properties);
  for (const {value} of Object.values(sent?.examples ?? {none: {}}))
    add(section, 'pre', value === undefined ? `curl ${url}` :
        `curl ${url} --json '${JSON.stringify(value)}'`);
  const {schema} = Object.values(operation.responses[200].content)[0];
  const {properties} = schema.oneOf ? named(schema.oneOf[0]) : named(schema);
  if (properties) addProperties(section, 'Get', properties);
  addList(section, 'Status', Object.entries(operation.responses).map(
    ([status, response]) => [status, response.description]));
}

const api = await (await fetch('openapi.json')).json();
document.getElementById('title').textContent = api.info.title;
document.getElementById('description').textContent = api.info.description;
for (const [path, operations] of Object.entries(api.paths))
  for (const method of METHODS)
    if (operations[method])
      addOperation(path, method, operations[method], api.components.schemas);
