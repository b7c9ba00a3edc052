package api

// propertyDocs describes, for the OpenAPI document, the properties of types that other rooms own: by schema and name,
// else by name.
var propertyDocs = map[string]string{}
